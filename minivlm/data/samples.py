"""Validated rows on disk: samples.parquet, pairs.parquet, quarantine.jsonl, summary.json (plain files, no cluster)."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from minivlm.data.errors import DataError
from minivlm.data.ratings import Ratings
from minivlm.schema import BadRow, Message, PreferencePair, Sample

_TEXTS = pa.list_(pa.string())
_TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SAMPLE_SCHEMA = pa.schema(
    [("sample_id", pa.string()), ("images", _TEXTS), ("image_sha256", _TEXTS), ("messages", _TURNS)]
    + [(name, pa.string()) for name in ("stage", "split", "task", "language", "answer", "file")]
    + [("row", pa.int64())]
)
PAIR_SCHEMA = pa.schema(
    [("pair_id", pa.string()), ("images", _TEXTS), ("image_sha256", _TEXTS)]
    + [(name, pa.string()) for name in ("question", "chosen", "rejected", "answer", "kind")]
    + [("ref_chosen_logps", pa.float64()), ("ref_rejected_logps", pa.float64()), ("reference", pa.string())]
    + [("file", pa.string()), ("row", pa.int64())]
)


PAIR_COLUMNS = [name for name in PAIR_SCHEMA.names if name not in ("file", "row")]
_DRAW_COLUMNS = pa.schema(
    [("source", pa.int32()), ("repeat", pa.float64())]
    + [(name, pa.int64()) for name in ("picture_key", "question_key", "whole_key")]
    + [("signature", pa.string()), ("ratings", pa.list_(pa.list_(pa.float64())))]
)
_STORED_SAMPLES = pa.unify_schemas([SAMPLE_SCHEMA, _DRAW_COLUMNS])
_STORED_PAIRS = pa.unify_schemas([PAIR_SCHEMA, pa.schema([("task", pa.string())]), _DRAW_COLUMNS])
BATCH_ROWS = 1000
LoadedSample = tuple[Sample, str, int]


@dataclass(frozen=True)
class DrawColumns:
    """What `minivlm.data.draw` needs to know of a row; the keys are None where no setting asks for them.

    `source` is the place among the sources of the stage, `repeat` the file's own, `ratings` has one list per column of
    the source's `min_rating`.
    """

    source: int = 0
    repeat: float = 1.0
    picture_key: int | None = None
    question_key: int | None = None
    whole_key: int | None = None
    signature: str | None = None
    ratings: Ratings | None = None


UNDRAWN = DrawColumns()


class SampleWriter:
    """Streams validated rows into a folder.

    with SampleWriter(folder) as writer:
        writer.add(samples=[...], pairs=[...], bad=[...])
    """

    def __init__(self, folder: Path) -> None:
        self._samples = pq.ParquetWriter(folder / "samples.parquet", _STORED_SAMPLES)
        self._pairs = pq.ParquetWriter(folder / "pairs.parquet", _STORED_PAIRS)
        self._quarantine = (folder / "quarantine.jsonl").open("w", encoding="utf-8")

    def __enter__(self) -> "SampleWriter":
        return self

    def add(
        self,
        samples: Sequence[Mapping[str, Any]] = (),
        pairs: Sequence[Mapping[str, Any]] = (),
        bad: Iterable[BadRow] = (),
    ) -> None:
        """Append rows: dicts of the schemas' columns."""
        if samples:
            self._samples.write_table(pa.Table.from_pylist(list(samples), _STORED_SAMPLES))
        if pairs:
            self._pairs.write_table(pa.Table.from_pylist(list(pairs), _STORED_PAIRS))
        for row in bad:
            self._quarantine.write(json.dumps(vars(row), ensure_ascii=False) + "\n")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._samples.close()
        self._pairs.close()
        self._quarantine.close()


def sample_columns(sample: Sample, file: str, row: int, drawing: DrawColumns = UNDRAWN) -> dict[str, Any]:
    """One row of samples.parquet."""
    turns = [vars(message) for message in sample.messages]
    return {**vars(sample), "messages": turns, "file": file, "row": row, **vars(drawing)}


def pair_columns(
    pair: PreferencePair, file: str, row: int, task: str, drawing: DrawColumns = UNDRAWN
) -> dict[str, Any]:
    """One row of pairs.parquet."""
    return {**vars(pair), "file": file, "row": row, "task": task, **vars(drawing)}


def load_samples(
    folder: Path, *, stage: str | None = None, split: str | None = None, task: str | None = None
) -> list[Sample]:
    """Samples of a prepared folder, in file order; None = all.

    Raises:
        DataError: nothing was prepared there.
    """
    return [sample for sample, _, _ in iter_rows(folder, stage=stage, split=split, task=task)]


def iter_rows(
    folder: Path, *, stage: str | None = None, split: str | None = None, task: str | None = None
) -> Iterator[LoadedSample]:
    """As `load_samples`, one after another, with the file and row that each came from."""
    wanted = {"stage": stage, "split": split, "task": task}
    for batch in read_batches(folder / "samples.parquet", SAMPLE_SCHEMA.names):
        mask = np.ones(len(batch), bool)
        for key, value in wanted.items():
            if value is not None:
                mask &= pc.equal(batch[key], value).to_numpy(zero_copy_only=False)
        yield from (to_loaded(row) for row in batch.filter(pa.array(mask)).to_pylist())


def iter_drawn(folder: Path, copies: np.ndarray) -> Iterator[tuple[LoadedSample, DrawColumns]]:
    """As `iter_rows`, each row as often as `copies` says (one number for each row of samples.parquet), one after
    another, with its source and ratings."""
    first = 0
    for batch in read_batches(folder / "samples.parquet", [*SAMPLE_SCHEMA.names, "source", "ratings"]):
        places = np.repeat(np.arange(len(batch)), copies[first : first + len(batch)])
        for row in batch.take(pa.array(places)).to_pylist():
            drawing = DrawColumns(source=row.pop("source"), ratings=row.pop("ratings"))
            yield to_loaded(row), drawing
        first += len(batch)


def load_pairs(folder: Path, copies: np.ndarray | None = None) -> list[PreferencePair]:
    """Pairs that the user brought (`data.mpo`), in file order, each as often as `copies` says (default: once).

    Raises:
        DataError: nothing was prepared there.
    """
    rows = (row for batch in read_batches(folder / "pairs.parquet", PAIR_COLUMNS) for row in batch.to_pylist())
    return [
        PreferencePair(**{**row, "images": tuple(row["images"]), "image_sha256": tuple(row["image_sha256"])})
        for place, row in enumerate(rows)
        for _ in range(1 if copies is None else int(copies[place]))
    ]


def load_pictures(folder: Path) -> dict[str, str]:
    """Path of every distinct picture, by digest."""
    pictures: dict[str, str] = {}
    for name in ("samples.parquet", "pairs.parquet"):
        for batch in read_batches(folder / name, ["image_sha256", "images"]):
            digests, paths = (batch[key].flatten().to_pylist() for key in ("image_sha256", "images"))
            for digest, path in zip(digests, paths, strict=True):
                pictures.setdefault(digest, path)
    return pictures


def to_loaded(row: dict[str, Any]) -> LoadedSample:
    """A row of samples.parquet without its columns for drawing."""
    file, number = row.pop("file"), row.pop("row")
    row["images"] = tuple(row["images"])
    row["image_sha256"] = tuple(row["image_sha256"])
    row["messages"] = tuple(Message(turn["role"], turn["content"]) for turn in row["messages"])
    return Sample(**row), file, number


def read_batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a table of validated rows, in parts.

    Raises:
        DataError: nothing was prepared there.
    """
    if not path.is_file():
        raise DataError(f"No prepared rows under {path.parent}. Run: python -m jobs.prepare")
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(BATCH_ROWS, columns=columns)
