"""Payloads to Ray Data tasks, and the plan of training as such a dataset.

Kept apart from the other data steps because Ray Train's processes import it, and every import costs them seconds.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import Dataset
from ray.data._internal.execution.execution_callback import ExecutionCallback

from minivlm.data.batches import make_batches, payload_block, plan_blocks
from minivlm.data.plan import PlannedStep

UNSPLIT_BYTES = 2**40
"""Block size that Ray Data never reaches: split blocks would go to the wrong ranks."""

RANKS_PER_BATCH_TASK = 2
"""Training workers that one such task at a time supplies."""

CPUS_PER_BATCH_TASK = 0.25
"""Logical CPUs of such a task: it copies memory and waits for the trainers most of the time."""

SCHEDULER_PAUSE_S = 0.02


class Pause(ExecutionCallback):
    """A rest after each round of Ray Data's scheduler.

    While the trainers have enough batches it has no task to wait for, and goes round without a pause (Ray 2.60):
    66 % of a core, half of the training speed on two cores.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data after each round."""
        time.sleep(SCHEDULER_PAUSE_S)


def feed_trainers(dataset: Dataset) -> Dataset:
    """Settings of a dataset whose blocks go to training workers one after another, as they are."""
    dataset.context.target_max_block_size = UNSPLIT_BYTES
    dataset.context.custom_execution_callback_classes = [Pause]
    return dataset


def micro_batch_dataset(
    table_dir: Path,
    features_dir: Path,
    steps: Sequence[PlannedStep],
    *,
    world_size: int,
    image_token_id: int,
    pad_token_id: int,
    first_step: int = 0,
) -> Dataset:
    """The plan as a Ray dataset: one row = one micro-batch; one block = the next rows of one rank, from one task.

    Under preserve_order `streaming_split(world_size, equal=True)` gives the next block to the rank with the fewest
    rows, so the blocks of `plan_blocks` go to the ranks in turn. Where Ray Train does the split, its DataConfig needs
    `ExecutionOptions(preserve_order=True)`: it replaces ours.

    Args:
        steps: what is left of the plan; `first_step` is the number of the first of them.

    Returns:
        Columns: step; is_last (last micro-batch of its step on its rank); num_tokens (supervised) and num_units, both
        of the whole step over all ranks; payload (`unpack_batch` gives the batch).
    """
    blocks = plan_blocks(table_dir, steps, world_size=world_size, first_step=first_step)
    make = partial(make_batches, str(table_dir), str(features_dir), image_token_id, pad_token_id)
    return feed_trainers(map_tasks(make, blocks, CPUS_PER_BATCH_TASK, -(-world_size // RANKS_PER_BATCH_TASK)))


def map_tasks(
    function: Callable[[pa.Table], pa.Table | Iterator[pa.Table]],
    payloads: list[Any],
    num_cpus: float,
    concurrency: int | None,
) -> Dataset:
    """One Ray task per payload, results in their order. The changed settings stay with this dataset."""
    dataset = ray.data.from_arrow([payload_block(payload) for payload in payloads]).map_batches(
        function,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=num_cpus,
        compute=ray.data.TaskPoolStrategy(size=concurrency),
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return dataset


def chain_tasks(
    payloads: list[Any],
    first: Callable[[pa.Table], Iterator[pa.Table]],
    first_cpus: float,
    second: Callable[[pa.Table], Iterator[pa.Table]],
    second_cpus: float,
) -> Dataset:
    """Every row that `first` makes of a payload is a task of `second`, so that a large payload is shared out.

    Rows are blocks of their own and stream through: memory does not grow with their number. The CPUs must differ, or
    Ray Data makes one task of the two.
    """
    dataset = map_tasks(first, payloads, first_cpus, None)
    dataset.context.target_max_block_size = 1
    return dataset.map_batches(second, batch_size=None, batch_format="pyarrow", num_cpus=second_cpus)
