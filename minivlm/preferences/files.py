"""Preference pairs on disk: parquet rows for this system, MMPR jsonl for others (and back through data.mpo)."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from minivlm.data.samples import PAIR_SCHEMA
from minivlm.schema import IMAGE_PLACEHOLDER, PreferencePair
from minivlm.storage import write_bytes, write_json

SCHEMA = pa.schema([column for column in PAIR_SCHEMA if column.name not in ("file", "row")])


def write_pairs(path: Path, pairs: Sequence[PreferencePair]) -> None:
    """Write all pairs as one parquet file, atomically."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(pair) for pair in pairs], schema=SCHEMA), sink)
    write_bytes(path, sink.getvalue().to_pybytes())


def read_pairs(path: Path) -> list[PreferencePair]:
    """Inverse of `write_pairs`.

    Raises:
        FileNotFoundError: no such file.
    """
    if not path.exists():
        raise FileNotFoundError(f"No preference pairs at {path}. Run: python -m jobs.preferences")
    return [
        PreferencePair(**row | {"images": tuple(row["images"]), "image_sha256": tuple(row["image_sha256"])})
        for row in pq.read_table(path).to_pylist()
    ]


def write_mmpr(folder: Path, pairs: Sequence[PreferencePair]) -> None:
    """mmpr.jsonl in MMPR's format and mmpr_meta.json naming it; `image` is relative to the meta's `root`.

    A picture at the start of the question is implied by `image`, as in MMPR.
    """
    parents = [os.path.dirname(image) for pair in pairs for image in pair.images]
    root = os.path.commonpath(parents) if parents else str(folder)
    lines = []
    for pair in pairs:
        images = [os.path.relpath(image, root) for image in pair.images]
        row: dict[str, Any] = {"id": pair.pair_id, "question": _without_leading_picture(pair)}
        row |= {"chosen": pair.chosen, "rejected": pair.rejected, "answer_gt": pair.answer, "kind": pair.kind}
        picture = {"image": images[0] if len(images) == 1 else images} if images else {}
        lines.append(json.dumps(picture | row, ensure_ascii=False) + "\n")
    write_bytes(folder / "mmpr.jsonl", "".join(lines).encode())
    entry = {"root": root, "annotation": str(folder / "mmpr.jsonl"), "data_augment": False, "repeat_time": 1}
    write_json(folder / "mmpr_meta.json", {"minivlm_pairs": entry | {"length": len(pairs)}})


def _without_leading_picture(pair: PreferencePair) -> str:
    if len(pair.images) == 1 and pair.question.startswith(IMAGE_PLACEHOLDER):
        return pair.question.removeprefix(IMAGE_PLACEHOLDER).lstrip("\n")
    return pair.question
