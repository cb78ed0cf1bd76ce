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

from minivlm.data.batches import first_uses, make_batches, open_table, payload_block, plan_blocks
from minivlm.data.encoder import ENCODE_COLUMN, BlockEncoder, Encoding
from minivlm.data.plan import PlannedStep
from minivlm.data.shards import committed_digests

UNSPLIT_BYTES = 2**40
"""Block size that Ray Data never reaches: split blocks would go to the wrong ranks."""

RANKS_PER_BATCH_TASK = 2
"""Training workers that one such task at a time supplies."""

CPUS_PER_BATCH_TASK = 0.25
"""Logical CPUs of such a task: it copies memory and waits for the trainers most of the time."""

ENCODER_WAIT_S = 600.0
"""How long such a task waits for pictures that another encoder actor has in work."""

SCHEDULER_PAUSE_S = 0.05


class Pause(ExecutionCallback):
    """A rest after each round of Ray Data's scheduler.

    While the trainers have enough batches it has no task to wait for, and goes round without a pause (Ray 2.60):
    66 % of a core, half of the training speed on two cores. With rests of 0.02 s it still took a tenth of one.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data after each round."""
        time.sleep(SCHEDULER_PAUSE_S)


def from_tables(tables: list[pa.Table]) -> Dataset:
    """The tables as a dataset, one block each.

    Not `ray.data.from_arrow`: for their schemas that has a task of a whole CPU look at each table (Ray 2.60), and the
    first one waits for a process to start.
    """
    return ray.data.from_blocks(tables)


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
    encoding: Encoding | None = None,
) -> Dataset:
    """The plan as a Ray dataset: one row = one micro-batch; one block = the next rows of one rank, from one task.

    Under preserve_order `streaming_split(world_size, equal=True)` gives the next block to the rank with the fewest
    rows, so the blocks of `plan_blocks` go to the ranks in turn. Where Ray Train does the split, its DataConfig needs
    `ExecutionOptions(preserve_order=True)`: it replaces ours.

    Args:
        steps: what is left of the plan; `first_step` is the number of the first of them.
        encoding: puts encoder actors before the tasks, for pictures that the cache lacks; None: it has them all.

    Returns:
        Columns: step; is_last (last micro-batch of its step on its rank); num_tokens (supervised) and num_units, both
        of the whole step over all ranks; payload (`unpack_batch` gives the batch).
    """
    blocks = plan_blocks(table_dir, steps, world_size=world_size, first_step=first_step)
    wait_s = 0.0 if encoding is None else ENCODER_WAIT_S
    make = partial(make_batches, str(table_dir), str(features_dir), image_token_id, pad_token_id, wait_s)
    tables = [payload_block(block) for block in blocks]
    if encoding is None:
        source = from_tables(tables)
    else:
        size = encoding.tower.batch_size
        encoded = committed_digests(features_dir)
        uses = first_uses(open_table(str(table_dir)), blocks, encoded=encoded, batch_size=size)
        source = encode_blocks(tables, uses, encoding)
    return feed_trainers(run_tasks(source, make, CPUS_PER_BATCH_TASK, -(-world_size // RANKS_PER_BATCH_TASK)))


def encode_blocks(tables: list[pa.Table], uses: list[list[str]], encoding: Encoding) -> Dataset:
    """The blocks, each once the pictures that `uses` lists for it are in the cache; several actors take turns."""
    columns = [pa.array([digests], pa.list_(pa.string())) for digests in uses]
    tables = [table.append_column(ENCODE_COLUMN, column) for table, column in zip(tables, columns, strict=True)]
    encoders = encoding.encoders
    return from_tables(tables).map_batches(
        BlockEncoder,
        fn_constructor_args=(encoding,),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=encoders.cpus,
        num_gpus=encoders.gpus,
        compute=ray.data.ActorPoolStrategy(size=encoders.count),
    )


def map_tasks(
    function: Callable[[pa.Table], pa.Table | Iterator[pa.Table]],
    payloads: list[Any],
    num_cpus: float,
    concurrency: int | None,
) -> Dataset:
    """One Ray task per payload, results in their order. The changed settings stay with this dataset."""
    return run_tasks(from_tables([payload_block(payload) for payload in payloads]), function, num_cpus, concurrency)


def run_tasks(
    source: Dataset,
    function: Callable[[pa.Table], pa.Table | Iterator[pa.Table]],
    num_cpus: float,
    concurrency: int | None,
) -> Dataset:
    """One Ray task per block of `source`, results in their order. The changed settings stay with this dataset."""
    dataset = source.map_batches(
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
