"""Validated samples -> encoded samples, with those that are too long set aside and counted, never cut."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from minivlm.data.errors import DataError
from minivlm.data.samples import LoadedSample
from minivlm.data.tokens import EncodedSample
from minivlm.schema import BadRow, Message
from minivlm.storage import write_bytes

Encode = Callable[[Sequence[Message]], tuple[list[int], list[int]]]


def encode_rows(
    rows: Iterable[LoadedSample], encode: Encode, *, max_length: int, max_bad_fraction: float, quarantine: Path
) -> Iterator[EncodedSample]:
    """Encode each row that fits; once all are read, list the others in `quarantine` (JSON lines of file, row, reason).

    Args:
        encode: messages -> (input_ids, labels).
        max_length: tokens, image tokens included.

    Raises:
        DataError: more rows are too long than max_bad_fraction allows.
    """
    bad: list[BadRow] = []
    total = 0
    for sample, file, row in rows:
        total += 1
        input_ids, labels = encode(sample.messages)
        if len(input_ids) > max_length:
            reason = f"{len(input_ids)} tokens, more than model.max_length_tokens={max_length}"
            bad.append(BadRow(file, row, reason))
            continue
        yield EncodedSample(
            sample.sample_id, np.array(input_ids, np.int32), np.array(labels, np.int32), sample.image_sha256
        )
    lines = "".join(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in bad)
    write_bytes(quarantine, lines.encode())
    if len(bad) > max_bad_fraction * total:
        raise DataError(
            f"{len(bad)} of {total} rows are too long, more than data.max_bad_fraction={max_bad_fraction:g} allows."
            f" First: {bad[0].file}, row {bad[0].row}: {bad[0].reason}. All of them: {quarantine}. "
            "Raise model.max_length_tokens or data.max_bad_fraction"
        )
