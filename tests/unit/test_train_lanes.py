"""Micro-batches side by side: who computes what, with which threads, on which memory."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from minivlm.train.lanes import Lanes, refuse_randomness
from tests.tiny_engine import tiny_vlm


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_items_go_round_the_lanes_and_results_keep_their_order():
    lanes = Lanes(tiny_vlm(), 3, is_compiled=False)
    assert lanes.run(lambda lane, item: (item, lane), range(7)) == [(item, item % 3) for item in range(7)]
    assert lanes.run(lambda lane, item: (item, lane), range(2)) == [(0, 0), (1, 1)]


def test_lanes_run_at_the_same_time_after_the_first_run_and_share_out_the_threads():
    lanes = Lanes(tiny_vlm(), 2, is_compiled=False)
    running = []

    def alone(lane: int, item: int) -> int:
        running.append(item)
        assert len(running) == 1
        running.remove(item)
        return torch.get_num_threads()

    assert lanes.run(alone, range(4)) == [2, 2, 2, 2]
    meeting = threading.Barrier(2, timeout=30)
    assert lanes.run(lambda lane, item: meeting.wait() + torch.get_num_threads(), range(2)) in ([2, 3], [3, 2])
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("failing", [0, 1])
def test_a_lane_that_fails_lets_the_others_end_and_gives_the_threads_back(failing: int):
    lanes = Lanes(tiny_vlm(), 2, is_compiled=False)
    lanes.run(lambda lane, item: None, range(2))
    done = []

    def work(lane: int, item: int) -> None:
        if lane == failing:
            raise ArithmeticError(f"lane {lane}")
        done.append(item)

    with pytest.raises(ArithmeticError, match=f"lane {failing}"):
        lanes.run(work, range(4))
    assert done == [1 - failing, 3 - failing]
    assert torch.get_num_threads() == 4


def test_twins_share_weights_and_mode_and_give_their_gradients_away():
    model = tiny_vlm()
    model.projector.requires_grad_(False)
    lanes = Lanes(model, 2, is_compiled=False)
    twin = lanes.modules[1]
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    assert all(mine is not its and mine.data_ptr() == its.data_ptr() for mine, its in pairs)
    assert all(mine.requires_grad == its.requires_grad for mine, its in pairs)
    head = twin.language_model.get_output_embeddings()
    assert head.weight is twin.language_model.get_input_embeddings().weight  # tied, and counted once
    for is_training in (True, False):
        model.train(is_training)
        lanes.run(lambda lane, item: None, range(2))
        assert {module.training for module in twin.modules()} == {is_training}
    learning = [(mine, its) for mine, its in pairs if mine.requires_grad]
    for place, (mine, its) in enumerate(learning):
        mine.grad = torch.full_like(mine, 2.0) if place % 2 else None
        its.grad = torch.full_like(its, 3.0) if place else None
    lanes.add_gradients()
    assert learning[0][0].grad is None
    assert all(
        bool((mine.grad == (5.0 if place % 2 else 3.0)).all()) for place, (mine, _) in enumerate(learning) if place
    )
    assert all(its.grad is None for _, its in pairs)


def test_lanes_have_the_callers_limits_of_compilation():
    """torch keeps its settings by context; with the usual 8 a lane would run its ninth layout as it is."""
    lanes = Lanes(tiny_vlm(), 2, is_compiled=False)
    with torch._dynamo.config.patch(recompile_limit=77):
        assert lanes.run(lambda lane, item: torch._dynamo.config.recompile_limit, range(2)) == [77, 77]


def test_what_draws_at_random_is_refused_by_name():
    model = tiny_vlm()
    refuse_randomness(model)
    attention = model.language_model.model.layers[0].self_attn
    for name in ("attention_dropout", "layerdrop", "router_jitter_noise"):
        setattr(attention, name, 0.25)
        with pytest.raises(ValueError, match=rf"layers\.0\.self_attn\.{name}=0\.25 draws .*parallel_micro_batches=1"):
            refuse_randomness(model)
        setattr(attention, name, 0.0)
    with pytest.raises(ValueError, match=r"1\.p=0\.1 draws"):
        refuse_randomness(nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.1)))
