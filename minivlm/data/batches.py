"""What Ray Data tasks run to make micro-batches: planned rows -> collated, serialized batches, one table row each.

Imports torch only inside the task: Ray Data's coordinators import this module too.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from minivlm.data.plan import MicroBatch, PlannedStep
from minivlm.data.tokens import TokenTable

if TYPE_CHECKING:
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


def make_batches(
    table_dir: str, features_dir: str, image_token_id: int, pad_token_id: int, block: pa.Table
) -> pa.Table:
    """Pickled BatchRows -> one table row per micro-batch: step, is_last, num_tokens, num_units, payload."""
    from minivlm.data.collate import collate, pack_batch

    table, features = open_table(table_dir), open_features(features_dir)
    rows: list[BatchRow] = [row for payload in block["payload"].to_pylist() for row in pickle.loads(payload)]
    ids = {"image_token_id": image_token_id, "pad_token_id": pad_token_id}
    batches = [collate(table, row.micro_batch, features.get, **ids) for row in rows]
    return pa.table(
        {
            "step": pa.array([row.step for row in rows], pa.int64()),
            "is_last": pa.array([row.is_last for row in rows], pa.bool_()),
            "num_tokens": pa.array([row.num_tokens for row in rows], pa.int64()),
            "num_units": pa.array([row.num_units for row in rows], pa.int64()),
            "payload": pa.array([pack_batch(batch) for batch in batches], pa.large_binary()),
        }
    )
