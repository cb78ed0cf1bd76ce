"""What Ray Data tasks run to make micro-batches, planned rows -> one table row each, and how a worker reads them.

Imports torch only inside the task: Ray Data's coordinators import this module too.
"""

import pickle
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from minivlm.data.plan import MicroBatch, PlannedStep
from minivlm.data.tokens import TokenTable

if TYPE_CHECKING:
    from minivlm.data.collate import Batch
    from minivlm.data.features import FeatureCache


MICRO_BATCHES_PER_BLOCK = 16
"""A block costs Ray's scheduler tens of milliseconds, as much as a small training step: so it holds several rows."""


@dataclass(frozen=True)
class BatchRow:
    """One micro-batch of the plan, with the counts of its whole step that the loss is divided by."""

    step: int
    is_last: bool
    num_tokens: int
    num_units: int
    micro_batch: MicroBatch


@lru_cache(maxsize=16)
def open_table(directory: str) -> TokenTable:
    """The token table, mapped once per process."""
    return TokenTable.open(Path(directory))


@lru_cache(maxsize=16)
def open_features(directory: str) -> "FeatureCache":
    """The feature cache, mapped once per process."""
    from minivlm.data.features import FeatureCache

    return FeatureCache.open(Path(directory))


def plan_blocks(
    table_dir: Path, steps: Sequence[PlannedStep], *, world_size: int, first_step: int = 0
) -> list[list[BatchRow]]:
    """The plan's micro-batches, several steps of one rank per block; block j is for rank j % world_size.

    The steps of a block give every rank equally many rows.

    Args:
        steps: what is left of the plan; `first_step` is the number of the first of them.
    """
    num_labels = open_table(str(table_dir)).num_labels
    ranks: list[list[BatchRow]] = [[] for _ in range(world_size)]
    blocks: list[list[BatchRow]] = []
    for step, planned in enumerate(steps, start=first_step):
        count = len(planned.micro_batches)
        tokens = sum(int(num_labels[entry]) for rows in planned.micro_batches for row in rows for entry in row)
        for index, micro_batch in enumerate(planned.micro_batches):
            is_last = index >= count - world_size
            ranks[index % world_size].append(BatchRow(step, is_last, tokens, len(planned.units), micro_batch))
        if len(ranks[0]) >= MICRO_BATCHES_PER_BLOCK or planned is steps[-1]:
            blocks += ranks
            ranks = [[] for _ in range(world_size)]
    return blocks


def payload_block(payload: Any) -> pa.Table:
    """What a task gets that maps payloads: a table of one pickled row."""
    return pa.table({"payload": pa.array([pickle.dumps(payload)], pa.binary())})


def first_uses(
    table: TokenTable, blocks: Sequence[Sequence[BatchRow]], *, encoded: Collection[str], batch_size: int
) -> list[list[str]]:
    """Which pictures each block has encoded on its way, so that each is encoded once and before it is shown.

    A picture belongs to the block that shows it first. Blocks take pictures of later ones forward, so that every
    forward of the tower but the last is full.

    Args:
        encoded: digests that have features already.
        batch_size: pictures per forward of the tower.

    Returns:
        Digests per block; together every picture of the blocks that is not in `encoded`, once.
    """
    shown = [
        table.pictures_of([entry for row in block for line in row.micro_batch for entry in line]) for block in blocks
    ]
    ends = np.cumsum([len(pictures) for pictures in shown])
    flat = np.concatenate(shown) if shown else np.empty(0, np.int32)
    _, positions = np.unique(flat, return_index=True)
    positions.sort()
    digests = table.digests
    firsts = [(int(position), digests[flat[position]]) for position in positions]
    lacking = [(position, digest) for position, digest in firsts if digest not in encoded]
    due = np.searchsorted([position for position, _ in lacking], ends)
    bounds = [0, *(min(-(-int(count) // batch_size) * batch_size, len(lacking)) for count in due)]
    return [[digest for _, digest in lacking[start:end]] for start, end in pairwise(bounds)]


def make_batches(
    table_dir: str, features_dir: str, image_token_id: int, pad_token_id: int, wait_s: float, block: pa.Table
) -> pa.Table:
    """Pickled BatchRows -> one table row per micro-batch: step, is_last, num_tokens, num_units, payload.

    Args:
        wait_s: how long to wait for pictures that encoder actors are working on, in seconds; 0 where all are there.
    """
    from minivlm.data.collate import collate, pack_batch

    table, features = open_table(table_dir), open_features(features_dir)
    rows: list[BatchRow] = [row for payload in block["payload"].to_pylist() for row in pickle.loads(payload)]
    ids = {"image_token_id": image_token_id, "pad_token_id": pad_token_id}
    batches = [collate(table, row.micro_batch, partial(features.get, wait_s=wait_s), **ids) for row in rows]
    return pa.table(
        {
            "step": pa.array([row.step for row in rows], pa.int64()),
            "is_last": pa.array([row.is_last for row in rows], pa.bool_()),
            "num_tokens": pa.array([row.num_tokens for row in rows], pa.int64()),
            "num_units": pa.array([row.num_units for row in rows], pa.int64()),
            "payload": pa.array([pack_batch(batch) for batch in batches], pa.large_binary()),
        }
    )


def read_step(rows: Iterator[dict[str, Any]], step: int) -> list["Batch"]:
    """The micro-batches of one step from a rank's rows, which go on behind it.

    Raises:
        RuntimeError: the rows are not those of the plan (a dataset built for another checkpoint, say).
    """
    from minivlm.data.collate import unpack_batch

    batches: list[Batch] = []
    for row in rows:
        if row["step"] != step:
            raise RuntimeError(f"step {step} was due, the dataset gave a micro-batch of step {row['step']}")
        batches.append(unpack_batch(row["payload"]))
        if row["is_last"]:
            return batches
    raise RuntimeError(f"the dataset ended within step {step}")
