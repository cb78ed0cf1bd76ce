"""Rows of table entries -> one padded batch, and the batch as bytes for the way through Ray."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from minivlm.data.plan import Row, padded_length
from minivlm.data.tokens import IGNORE, TokenTable

Batch = dict[str, Tensor]


def collate(
    table: TokenTable,
    rows: Sequence[Row],
    features: Callable[[tuple[str, ...]], Tensor],
    *,
    image_token_id: int,
    pad_token_id: int,
) -> Batch:
    """Lay entries into rows, each an own segment that shares nothing with its neighbours.

    Args:
        rows: table entries per row; none at all gives the zero-weight batch: one row of padding.
        features: digests -> image_features [n, P, D]; called once with the distinct pictures of the batch.

    Returns:
        input_ids, position_ids, segment_ids, labels [B, T] int64; image_features [N, P, D]; image_index [K] int64;
        reference_logps [S] float32 where the table has them.

    Raises:
        ValueError: an entry has more or fewer placeholder tokens per picture than the first one. (That they are as
            many as the projector gives is checked where it runs: `MiniVLM.embed`.)
    """
    width = padded_length(rows, table.lengths)
    shape = (max(len(rows), 1), width)
    input_ids = np.full(shape, pad_token_id, np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    position_ids, segment_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    pictures: dict[str, int] = {}
    image_index: list[int] = []
    placeholders: list[tuple[str, int, int]] = []
    entries = [entry for row in rows for entry in row]
    segment = 0
    for line, row in enumerate(rows):
        start = 0
        for entry in row:
            sample = table[entry]
            end = start + len(sample.input_ids)
            segment += 1
            input_ids[line, start:end] = sample.input_ids
            labels[line, start:end] = sample.labels
            position_ids[line, start:end] = np.arange(end - start)
            segment_ids[line, start:end] = segment
            image_index += [pictures.setdefault(digest, len(pictures)) for digest in sample.image_sha256]
            found = int(np.count_nonzero(sample.input_ids == image_token_id))
            placeholders.append((sample.sample_id, found, len(sample.image_sha256)))
            start = end
    image_features = features(tuple(pictures))
    num_image_tokens = next((found // count for _, found, count in placeholders if count), 0)
    for name, found, count in placeholders:
        if found != count * num_image_tokens:
            raise ValueError(
                f"sample {name} has {found} placeholder tokens for {count} picture(s), others of its batch "
                f"{num_image_tokens} for each: the table is damaged. Delete {table.directory} and prepare again"
            )
    batch = {"input_ids": input_ids, "position_ids": position_ids, "segment_ids": segment_ids, "labels": labels}
    tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
    tensors |= {"image_features": image_features, "image_index": torch.tensor(image_index, dtype=torch.int64)}
    if table.reference_logps is not None:
        tensors["reference_logps"] = torch.from_numpy(table.reference_logps[np.asarray(entries, np.int64)])
    return tensors


def pack_batch(batch: Batch) -> bytes:
    """Serialize a batch (safetensors: no pickle)."""
    return save({key: value.contiguous() for key, value in batch.items()})


def unpack_batch(data: bytes) -> Batch:
    """Inverse of `pack_batch`."""
    return dict(load(data))
