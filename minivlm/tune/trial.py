"""One trial of a search, inside its Tune actor: the loop of the stage, in a group of this one process.

A sweep needs many short runs, so a trial has no Ray Train controller and no Ray Data coordinators of its own: they
are most of what such a run costs (docs/RESULTS.md). The plan, its batches, the loop and the checkpoints are those of a
stage with one worker. Tune gives the actor of an ended trial the next one, with everything imported.
"""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from minivlm.data.batches import make_batches, payload_block, plan_blocks
from minivlm.train.environment import worker_environment
from minivlm.train.feed import newest_step
from minivlm.train.job import StageJob, plan_training
from minivlm.train.launch import RESULT_FILE, finish
from minivlm.train.metrics import METRICS_FILE, read_metrics
from minivlm.train.stages import TrainingError

if TYPE_CHECKING:
    import torch

METRIC = "val/loss"


def run_trial(space: dict[str, int], jobs: list[StageJob]) -> None:
    """What Tune calls: train `jobs[space["index"]]`; what was reported before an interruption is reported again.

    Raises:
        TrainingError: the loss is not finite.
    """
    job = jobs[space["index"]]
    kept = newest_step(job.run_dir)
    for line in read_metrics(job.run_dir / METRICS_FILE):
        if line["step"] <= kept:
            report_to_tune(line, None)
    if (job.run_dir / RESULT_FILE).exists():
        return
    os.environ.update(worker_environment(job.config))
    from minivlm.train.loop import train_loop  # after the environment that its imports read

    device = join_own_group(job.config.train.use_gpu)
    outcome = train_loop(job, planned_rows(job), device, report_to_tune)
    gc.collect()  # the actor lives on
    if "error" in outcome:
        raise TrainingError(outcome["error"])
    finish(job)


def report_to_tune(metrics: dict[str, Any], checkpoint: Path | None) -> None:
    """Pass on the validation losses (plain checkpoints would confuse ASHA's count); a stopped trial ends here."""
    if METRIC in metrics:
        tune.report({METRIC: metrics[METRIC], "step": int(metrics["step"])})


def planned_rows(job: StageJob) -> Iterator[dict[str, Any]]:
    """The micro-batches that are left, made in this process: the rows that Ray Data would give a single worker."""
    first_step = newest_step(job.run_dir)
    steps = plan_training(job, first_step=first_step)
    for block in plan_blocks(job.train_table, steps, world_size=1, first_step=first_step):
        table = make_batches(
            str(job.train_table), str(job.features_dir), job.image_token_id, job.pad_token_id, 0.0, payload_block(block)
        )
        yield from table.to_pylist()


def join_own_group(use_gpu: bool) -> "torch.device":
    """Make a torch.distributed group of this process alone, kept for the next trial: DeepSpeed keeps it too."""
    import torch
    import torch.distributed as dist

    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})  # DeepSpeed reads them
    if not dist.is_initialized():
        dist.init_process_group("nccl" if use_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    return torch.device("cuda" if use_gpu else "cpu")
