"""What Ray Train's controller and workers unpickle: entry points and datasets of the stages and of the clip job.

Kept apart from the loops and from `launch`, so that a process imports torch, DeepSpeed and transformers only where it
needs them: a start costs seconds, most of them imports. Ray Data's coordinators need none of the three.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import ray.data
import ray.train
from ray.data import Dataset
from ray.train import Checkpoint, CheckpointUploadMode

from minivlm.data.stream import feed_trainers, micro_batch_dataset
from minivlm.model.checkpoint import MANIFEST, newest_complete
from minivlm.train.clip_batches import ClipJob, make_rows, num_blocks
from minivlm.train.job import StageJob, plan_training


def newest_step(run_dir: Path) -> int:
    """Finished steps of the newest complete checkpoint; 0 without one."""
    path = newest_complete(run_dir)
    return int(json.loads((path / MANIFEST).read_text())["step"]) if path else 0


def stage_dataset(job: StageJob) -> Dataset:
    """Micro-batches of the steps that are left. Ray Train calls it each time it starts a group of workers."""
    first_step = min(newest_step(job.run_dir), job.total_steps - 1)
    return micro_batch_dataset(
        job.train_table,
        job.features_dir,
        plan_training(job, first_step=first_step),
        first_step=first_step,
        world_size=job.config.train.num_workers,
        image_token_id=job.image_token_id,
        pad_token_id=job.pad_token_id,
        encoding=job.encoding,
    )


def clip_dataset(job: ClipJob) -> Dataset:
    """All micro-batches of the clip job, several steps of one rank per block."""
    count = num_blocks(job)
    dataset = ray.data.range(count, override_num_blocks=count).map_batches(
        partial(make_rows, job), batch_size=None, batch_format="pyarrow"
    )
    return feed_trainers(dataset)


def stage_worker(config: dict[str, StageJob]) -> dict[str, str]:
    """What Ray Train starts in each worker of a stage: `{"job": job}` -> the loop's outcome."""
    rows, job = shard_rows(), config["job"]  # data tasks start while this process imports
    import torch  # only workers pay for importing these
    from ray.train.torch import get_device

    from minivlm.train.loop import train_loop

    device = get_device() if job.config.train.use_gpu else torch.device("cpu")
    return train_loop(job, rows, device, report_to_ray_train)


def report_to_ray_train(metrics: dict[str, Any], checkpoint: Path | None) -> None:
    """Tell the driver (a barrier). The checkpoint is complete and in its place: Ray uploads nothing."""
    if checkpoint is None:
        ray.train.report(metrics)
        return
    ray.train.report(
        metrics,
        checkpoint=Checkpoint.from_directory(str(checkpoint)),
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
    )


def clip_worker(config: dict[str, ClipJob]) -> dict[str, str]:
    """What Ray Train starts in each worker of the clip job: `{"job": job}` -> the loop's outcome."""
    rows, job = shard_rows(), config["job"]
    from ray.train.torch import get_device  # only workers pay for importing these

    from minivlm.train.clip_loop import train_loop

    return train_loop(job, rows, get_device() if job.use_gpu else None)


def shard_rows() -> Iterator[dict[str, Any]]:
    """This rank's rows of the dataset "train", in order; the first one is fetched from now on, in a thread."""
    blocks = ray.train.get_dataset_shard("train").iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=2
    )
    rows = (row for block in blocks for row in block.to_pylist())
    first = ThreadPoolExecutor(1, thread_name_prefix="first-batch").submit(lambda: list(islice(rows, 1)))
    return (row for part in (first.result, lambda: rows) for row in part())
