"""Curve file, progress, step counting and retrieval."""

import json
import time
from pathlib import Path

import pytest
import torch

from minivlm.config.train import StageConfig
from minivlm.scoring.retrieval import retrieval_recall
from minivlm.train.job import count_steps, evenly_spaced
from minivlm.train.metrics import MetricsWriter, ProgressFollower, read_metrics


def test_lines_behind_the_checkpoint_are_dropped_on_resume(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, after_step=0)
    for step in (1, 2, 3):
        writer.write({"step": step, "train/loss": 1.0 / step})
    with path.open("a") as file:
        file.write('{"step": 4, "train/lo')  # the process died here
    MetricsWriter(path, after_step=2).write({"step": 3, "train/loss": 9.0})
    assert [json.loads(line)["train/loss"] for line in path.read_text().splitlines()] == [1.0, 0.5, 9.0]


def test_a_torn_line_is_not_read(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    assert read_metrics(path) == [{"step": 1}]
    assert read_metrics(tmp_path / "missing.jsonl") == []


def test_progress_counts_steps_once_although_a_restart_writes_the_file_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "metrics.jsonl"
    with ProgressFollower(path, first_step=0, total_steps=6, label="sft", interval_s=0.02):
        writer = MetricsWriter(path, after_step=0)
        for step in (1, 2, 3):
            writer.write({"step": step, "train/loss": 1.0})
        time.sleep(0.2)
        writer = MetricsWriter(path, after_step=2)
        for step in (3, 4, 5):
            writer.write({"step": step, "train/loss": 0.123456789, "lr": 0.5})
    assert "sft 5/6" in capsys.readouterr().err


def test_progress_does_not_count_the_lines_of_a_run_that_died(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "metrics.jsonl"
    dead = MetricsWriter(path, after_step=0)
    for step in range(1, 6):
        dead.write({"step": step, "train/loss": 1.0})
    with ProgressFollower(path, first_step=0, total_steps=6, label="sft", interval_s=0.02):
        time.sleep(0.2)
        MetricsWriter(path, after_step=0).write({"step": 1, "train/loss": 1.0})
        time.sleep(0.2)
    assert "sft 1/6" in (shown := capsys.readouterr().err)
    assert "sft 5/6" not in shown


def test_validation_points_are_even_and_end_at_the_end():
    assert evenly_spaced(10, 1) == {10}
    assert evenly_spaced(10, 4) == {2, 5, 8, 10}
    assert evenly_spaced(2, 5) == {1, 2}


@pytest.mark.parametrize(("epochs", "max_steps", "expected"), [(1, None, 4), (3, None, 12), (3, 5, 5), (1, 50, 4)])
def test_the_last_incomplete_batch_counts_as_a_step(epochs: int, max_steps: int | None, expected: int):
    assert count_steps(31, StageConfig(global_batch_size=8, epochs=epochs, max_steps=max_steps)) == expected


def test_recall_counts_targets_among_the_nearest():
    pictures = torch.eye(4)
    captions = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.4, 0, 0], [0, 0, 1.0, 0], [0, 0, 0.9, 0.1]])
    assert retrieval_recall(pictures, captions, 1) == 1.0
    assert retrieval_recall(captions, pictures, 1) == 0.5  # captions 1 and 3 are nearer to pictures 0 and 2
    assert retrieval_recall(captions, pictures, 2) == 1.0


def test_equal_embeddings_earn_nothing():
    assert retrieval_recall(torch.ones(4, 2), torch.ones(4, 2), 1) == 0.0
    with pytest.raises(ValueError, match="one shape"):
        retrieval_recall(torch.ones(4, 2), torch.ones(3, 2), 1)
