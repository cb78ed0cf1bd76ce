"""Kill -9 at any moment, and another number of workers afterwards: plain processes over gloo, no Ray."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from minivlm.model.checkpoint import newest_complete
from minivlm.train.feed import newest_step
from minivlm.train.job import StageJob, plan_training
from minivlm.train.metrics import METRICS_FILE, read_metrics
from tests.train_processes import NUM_SAMPLES, Group, changed, make_toy, run_job

STEPS, STEPS_PER_EPOCH = 9, 3
MUON = {"muon_learning_rate": 0.02}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> StageJob:
    """9 steps, checkpoints after 4, 8 and 9."""
    job = make_toy(tmp_path_factory.mktemp("toy"))
    assert job.total_steps == STEPS
    return job


def final_weights(job: StageJob) -> dict[str, torch.Tensor]:
    assert newest_step(job.run_dir) == STEPS
    found = newest_complete(job.run_dir)
    assert found is not None
    return load_file(found / "export" / "model.safetensors")


def losses(job: StageJob) -> list[float]:
    return [line["train/loss"] for line in read_metrics(job.run_dir / METRICS_FILE)]


def kill_while_saving(job: StageJob) -> None:
    """SIGKILL all ranks while a checkpoint is written."""
    checkpoints = job.run_dir / "checkpoints"
    for _ in range(5):
        group = Group(job)
        group.wait_for(lambda: any(checkpoints.glob(".step=*.tmp")))
        group.kill(0, 1)
        if any(checkpoints.glob(".step=*.tmp")):
            return
        shutil.rmtree(job.run_dir)  # too late: it was committed
    raise AssertionError("no kill came in time")


def states(directory: Path) -> dict[str, torch.Tensor]:
    """Every state of every parameter, whole and flat, from whatever runs the files hold."""
    runs: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in directory.glob("*.safetensors"):
        for label, values in load_file(path).items():
            state, start = label.rsplit("/", 1)
            runs.setdefault(state, []).append((int(start), values.float()))
    whole = {}
    for state, parts in runs.items():
        whole[state] = torch.full((max(start + len(values) for start, values in parts),), torch.nan)
        for start, values in parts:
            whole[state][start : start + len(values)] = values
    return whole


@pytest.mark.parametrize(("zero_stage", "lanes"), [(0, 1), (0, 2), (1, 1), (2, 1), (3, 1)])
def test_killed_anywhere_ends_with_the_same_bits(toy: StageJob, tmp_path: Path, zero_stage: int, lanes: int):
    settings = {"zero_stage": zero_stage, "num_workers": 2}
    settings |= {"parallel_micro_batches": lanes, "threads_per_worker": lanes}
    whole = changed(toy, tmp_path / "whole", **settings)
    assert run_job(whole) == {}
    killed = changed(toy, tmp_path / "killed", **settings)
    kill_while_saving(killed)
    assert newest_step(killed.run_dir) in (0, 4, 8)
    Group(killed, hold=(zero_stage % 2, 5 + zero_stage)).kill_held()  # one of the ranks, in steps 5 to 8
    assert newest_step(killed.run_dir) == (4 if zero_stage < 3 else 8)
    assert run_job(killed) == {}
    assert losses(killed) == losses(whole)
    assert_close(final_weights(killed), final_weights(whole), atol=0, rtol=0)


@pytest.mark.parametrize("optimizer", [{}, MUON], ids=["adamw", "muon"])
def test_two_workers_then_one_then_two_use_each_sample_once_per_epoch(
    toy: StageJob, tmp_path: Path, optimizer: dict[str, float]
):
    whole = changed(toy, tmp_path / "whole", num_workers=2, zero_stage=2, stage=optimizer)
    assert run_job(whole) == {}
    settings = {"stage": optimizer, "checkpoint_every_steps": 2}
    groups, firsts = [], []
    for workers, zero_stage, stop in ((2, 2, 3), (1, 1, 7), (2, 3, None)):
        job = changed(toy, tmp_path / "changing", num_workers=workers, zero_stage=zero_stage, **settings)
        firsts.append(newest_step(job.run_dir))
        groups.append(Group(job, hold=(workers - 1, stop) if stop else None))
        if stop:
            groups[-1].kill_held()
        else:
            assert groups[-1].outcome() == {}
    assert firsts == [0, 2, 6]
    used: dict[int, list[int]] = {step: [] for step in range(STEPS)}
    for group, start, end in zip(groups, firsts, [*firsts[1:], STEPS], strict=True):
        for step, samples in group.seen():
            if start <= step < end:
                used[step] += samples
    planned = [sorted(step.units) for step in plan_training(job)]
    assert [sorted(used[step]) for step in range(STEPS)] == planned
    for epoch in range(STEPS // STEPS_PER_EPOCH):
        steps = range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
        assert Counter(sample for step in steps for sample in used[step]) == Counter(range(NUM_SAMPLES))
    assert_close(torch.tensor(losses(job)), torch.tensor(losses(whole)), atol=1e-4, rtol=0)
    assert_close(final_weights(job), final_weights(whole), atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_another_layout_reads_the_same_bits(toy: StageJob, tmp_path: Path, precision: str):
    """2 workers with ZeRO-2, 1 with ZeRO-1, 3 with ZeRO-3, 2 with ZeRO-0: all states of step 4 stay as they are."""
    settings = {"precision": precision, "stage": MUON}  # AdamW for the rest
    before = changed(toy, tmp_path / "run", num_workers=2, zero_stage=2, **settings)
    Group(before, hold=(1, 5)).kill_held()
    found = newest_complete(before.run_dir)
    assert found is not None
    expected = states(found / "engine")
    keys = {state.rsplit("/", 1)[1] for state in expected}
    assert keys == {"master", "exp_avg", "exp_avg_sq", "momentum_buffer"}
    for workers, zero_stage in ((1, 1), (3, 3), (2, 0)):
        after = changed(toy, tmp_path / "run", num_workers=workers, zero_stage=zero_stage, **settings)
        again = tmp_path / f"again-{zero_stage}"
        assert Group(after, resave_to=again).outcome() == {}
        assert_close(states(again), expected, atol=0, rtol=0)
