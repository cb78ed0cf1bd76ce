"""What Ray Data tasks run to make micro-batches: planned rows -> collated, serialized batches, one table row each.

Imports torch only inside the task: Ray Data's coordinators import this module too.
"""

import pickle
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from minivlm.data.plan import MicroBatch
from minivlm.data.tokens import TokenTable

if TYPE_CHECKING:
    from minivlm.data.features import FeatureCache


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
