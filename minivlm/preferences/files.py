"""Preference pairs on disk: parquet rows for this system, MMPR jsonl for others (and back through data.mpo); questions
for another round."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from minivlm.data.samples import PAIR_SCHEMA
from minivlm.schema import CORRECTNESS_KIND, IMAGE_PLACEHOLDER, PreferencePair, Sample
from minivlm.storage import write_bytes, write_json

MMPR_NAMES = {
    CORRECTNESS_KIND: "minivlm_correctness_rules",
    "format": "minivlm_format_rules",
    "dropout_ntp": "minivlm_dropout_ntp",
}
"""`kind` of a pair -> the entry of mmpr_meta.json and the file that hold it."""

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
    """One jsonl file in MMPR's format for each kind of pairs, and mmpr_meta.json naming them; files of kinds that there
    are no pairs of are removed.

    `image` is relative to the meta's `root`; a picture at the start of the question is implied by it, as in MMPR. The
    question is the one that was asked, with its request for reasoning.
    """
    root = _common_root(folder, [image for pair in pairs for image in pair.images])
    meta: dict[str, Any] = {}
    for kind, name in MMPR_NAMES.items():
        rows = [
            _picture(pair.images, root)
            | {"id": pair.pair_id, "question": _without_leading_picture(pair.question, len(pair.images))}
            | {"chosen": pair.chosen, "rejected": pair.rejected, "answer_gt": pair.answer, "kind": pair.kind}
            for pair in pairs
            if pair.kind == kind
        ]
        path = folder / f"{name}.jsonl"
        if rows:
            meta[name] = _write_rows(path, rows, root)
        else:
            path.unlink(missing_ok=True)
    write_json(folder / "mmpr_meta.json", meta)


def write_unsolved(folder: Path, samples: Sequence[Sample]) -> None:
    """unsolved.jsonl: questions that no sampled answer was right for, as MMPR's pipeline reads its prompts, and
    unsolved_meta.json with their pictures' root, for `data.prompts: [{path: .., split: train}]` of another round.

    An answer that a row has stands under `chosen`, without a `rejected`: its form tells what the question asks for.
    """
    root = _common_root(folder, [image for sample in samples for image in sample.images])
    rows = []
    for sample in samples:
        question = next(message.content for message in sample.messages if message.role == "user")
        row: dict[str, Any] = {"id": sample.sample_id}
        row |= {"question": _without_leading_picture(question, len(sample.images))}
        row |= {"answer": sample.answer, "task": sample.task, "language": sample.language}
        written = "\n".join(message.content for message in sample.messages if message.role == "assistant")
        row |= {"chosen": written} if written.strip() else {}
        rows.append(_picture(sample.images, root) | row)
    entry = _write_rows(folder / "unsolved.jsonl", rows, root)
    write_json(folder / "unsolved_meta.json", {"unsolved": entry})


def _write_rows(path: Path, rows: Sequence[dict[str, Any]], root: str) -> dict[str, Any]:
    """The catalogue's entry of the file."""
    write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return {"root": root, "annotation": str(path), "data_augment": False, "repeat_time": 1, "length": len(rows)}


def _common_root(folder: Path, images: Sequence[str]) -> str:
    return os.path.commonpath([os.path.dirname(image) for image in images]) if images else str(folder)


def _picture(images: Sequence[str], root: str) -> dict[str, Any]:
    names = [os.path.relpath(image, root) for image in images]
    return {"image": names[0] if len(names) == 1 else names} if names else {}


def _without_leading_picture(question: str, num_images: int) -> str:
    if num_images == 1 and question.startswith(IMAGE_PLACEHOLDER):
        return question.removeprefix(IMAGE_PLACEHOLDER).lstrip("\n")
    return question
