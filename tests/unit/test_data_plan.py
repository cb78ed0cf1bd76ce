"""The batch plan: every unit once, the same steps for any world size, little padding, exact resume."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlm.data.plan import PlannedStep, padded_length, plan_epoch

LENGTHS = st.lists(st.integers(1, 90), min_size=2, max_size=60)


def plan(lengths: list[int] | np.ndarray, **changes: int) -> list[PlannedStep]:
    values = {
        "seed": 0,
        "epoch": 0,
        "global_batch_size": 16,
        "world_size": 2,
        "micro_batch_tokens": 256,
        "pack_length": 96,
    }
    return plan_epoch(lengths, **(values | changes))


def entries(step: PlannedStep) -> list[int]:
    return [entry for micro_batch in step.micro_batches for row in micro_batch for entry in row]


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 5), st.integers(1, 20), st.integers(0, 3))
def test_every_entry_is_used_exactly_once_per_epoch(lengths, world_size, global_batch_size, epoch):
    steps = plan(lengths, world_size=world_size, global_batch_size=global_batch_size, epoch=epoch)
    assert Counter(entry for step in steps for entry in entries(step)) == Counter(range(len(lengths)))
    assert all(sorted(entries(step)) == sorted(step.units) for step in steps)
    assert [len(step.units) for step in steps[:-1]] == [global_batch_size] * (len(steps) - 1)


@settings(max_examples=40)
@given(LENGTHS, st.integers(0, 5))
def test_the_steps_do_not_depend_on_the_world_size(lengths, seed):
    orders = [[step.units for step in plan(lengths, seed=seed, world_size=world)] for world in (1, 2, 4)]
    assert orders[0] == orders[1] == orders[2]


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 5), st.sampled_from([32, 64, 100, 256, 4096]))
def test_micro_batches_fill_all_ranks_and_stay_under_the_token_limit(lengths, world_size, limit):
    for step in plan(lengths, world_size=world_size, micro_batch_tokens=limit):
        assert len(step.micro_batches) % world_size == 0
        for rows in step.micro_batches:
            alone = sum(len(row) for row in rows) == 1
            assert alone or len(rows) * padded_length(rows, lengths) <= limit or not rows
            assert all(rows) or not rows


@settings(max_examples=40)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=40), st.integers(1, 3))
def test_chosen_and_rejected_stand_side_by_side_in_one_row(lengths, world_size):
    lengths = lengths[: len(lengths) // 2 * 2]
    for step in plan(lengths, group_size=2, world_size=world_size, global_batch_size=8):
        for rows in step.micro_batches:
            for row in rows:
                assert list(row[1::2]) == [entry + 1 for entry in row[::2]]
                assert all(entry % 2 == 0 for entry in row[::2])


def caption_lengths() -> np.ndarray:
    return 50 + np.random.default_rng(1).integers(11, 35, 2000)


def long_tailed_lengths() -> np.ndarray:
    return np.minimum(512, 30 + np.random.default_rng(1).lognormal(3.5, 1, 2000)).astype(int)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("lengths", [caption_lengths(), long_tailed_lengths()], ids=["captions", "long tail"])
def test_padding_and_waiting_stay_under_five_percent(lengths, world_size):
    steps = plan(lengths, world_size=world_size, global_batch_size=64, micro_batch_tokens=4096, pack_length=128)
    areas = [[len(rows) * padded_length(rows, lengths) for rows in step.micro_batches] for step in steps]
    waves = [step[start : start + world_size] for step in areas[:-1] for start in range(0, len(step), world_size)]
    padded = sum(sum(step) for step in areas)
    assert 1 - lengths.sum() / padded <= 0.05
    assert 1 - sum(sum(wave) for wave in waves) / sum(world_size * max(wave) for wave in waves) <= 0.05


def test_equal_lengths_are_laid_out_without_padding():
    (step,) = plan([32] * 16, global_batch_size=16, world_size=2, micro_batch_tokens=256, pack_length=128)
    assert len(step.micro_batches) == 2
    assert all(len(rows) * padded_length(rows, [32] * 16) == 256 for rows in step.micro_batches)


def test_an_over_long_sample_is_alone_in_its_micro_batch():
    (step,) = plan([10, 500, 10], micro_batch_tokens=64, pack_length=64, world_size=1)
    assert ((1,),) in step.micro_batches


def test_missing_micro_batches_are_zero_weight_ones_at_the_end():
    (step,) = plan([40], world_size=4)
    assert step.micro_batches == (((0,),), (), (), ())


def test_epochs_differ_and_repeat_exactly():
    lengths = list(range(10, 60))
    first, again, second = plan(lengths, epoch=0), plan(lengths, epoch=0), plan(lengths, epoch=1)
    assert first == again
    assert [step.units for step in first] != [step.units for step in second]


def test_lengths_that_form_no_pairs_are_refused():
    with pytest.raises(ValueError, match="3 entries do not form groups of 2"):
        plan([5, 5, 5], group_size=2)
