"""Parts of files -> chunks of raw rows -> checked samples and pairs, or the reason why not. Called in Ray Data tasks.

Every picture is opened, decoded and digested here, so that training never meets a file that it cannot read.
"""

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from minivlm.data.batches import payload_block
from minivlm.data.duplicates import row_key, text_signature
from minivlm.data.errors import DataError, RowError
from minivlm.data.formats import rated_columns
from minivlm.data.images import BadImage, ImageLimits, open_image, read_image, resolve_image
from minivlm.data.ratings import Ratings, read_ratings
from minivlm.data.readers import read_part
from minivlm.data.samples import DrawColumns, pair_columns, sample_columns
from minivlm.data.sources import decode_row, parse_row, text_field, to_pair, to_sample
from minivlm.schema import BadRow, PreferencePair, Sample
from minivlm.storage import write_bytes

Row = TypeVar("Row", Sample, PreferencePair)


@dataclass(frozen=True)
class Source:
    """One annotation file and how its rows are read. `stage` is pretrain, sft, prompts or mpo.

    `columns` renames keys of its rows, `repeat` is a catalogue's repeat_time, `place` counts the sources of the stage,
    and `rating_columns` are kept for `min_rating`.
    """

    path: str
    image_root: str
    stage: str
    split: str
    task: str
    columns: tuple[tuple[str, str], ...] = ()
    repeat: float = 1.0
    place: int = 0
    rating_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rules:
    """What a row must keep to, how rows without a split get one, and where pictures go that lie inside of rows.

    `with_keys` and `with_signatures` ask for what duplicates are found by.
    """

    limits: ImageLimits
    val_fraction: float
    test_fraction: float
    pictures_dir: str
    with_keys: bool = False
    with_signatures: bool = False


@dataclass(frozen=True)
class Checked:
    """Rows of one chunk: dicts of the parquet columns, and those set aside."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


def check_rows(rows: list[tuple[int, Any]], source: Source, rules: Rules) -> Checked:
    """Check numbered raw rows of one source, in order."""
    checked = Checked()
    for number, raw in rows:
        default_id = f"{Path(source.path).stem}-{number}"
        try:
            row = parse_row(raw, dict(source.columns))
            if source.stage == "mpo":
                pair = _with_pictures(to_pair(row, default_id=default_id), row["images"], source, rules)
                drawing = _pair_drawing(pair, raw, source, rules)
                task = text_field(row, "task") or source.task
                checked.pairs.append(pair_columns(pair, source.path, number, task, drawing))
            else:
                sample = to_sample(row, stage=source.stage, split=source.split, task=source.task, default_id=default_id)
                sample = _with_split(_with_pictures(sample, row["images"], source, rules), rules)
                drawing = _sample_drawing(sample, raw, source, rules)
                checked.samples.append(sample_columns(sample, source.path, number, drawing))
        except (RowError, BadImage) as error:
            checked.bad.append(BadRow(source.path, number, str(error)))
    return checked


def _sample_drawing(sample: Sample, raw: Any, source: Source, rules: Rules) -> DrawColumns:
    questions = [message.content for message in sample.messages if message.role == "user"]
    answers = [message.content for message in sample.messages if message.role == "assistant"]
    ratings = _ratings(raw, source, len(answers))
    return _drawing(sample.image_sha256, questions, answers, ratings, source, rules)


def _pair_drawing(pair: PreferencePair, raw: Any, source: Source, rules: Rules) -> DrawColumns:
    answers = [pair.chosen, pair.rejected]
    return _drawing(pair.image_sha256, [pair.question], answers, _ratings(raw, source, 1), source, rules)


def _ratings(raw: Any, source: Source, num_answers: int) -> Ratings | None:
    if not source.rating_columns:
        return None
    return read_ratings(rated_columns(decode_row(raw)), source.rating_columns, num_answers)


def _drawing(
    pictures: tuple[str, ...],
    questions: list[str],
    answers: list[str],
    ratings: Ratings | None,
    source: Source,
    rules: Rules,
) -> DrawColumns:
    drawing = DrawColumns(source=source.place, repeat=source.repeat, ratings=ratings)
    if rules.with_keys:
        drawing = replace(
            drawing,
            picture_key=row_key(pictures, ()) if pictures else 0,
            question_key=row_key(pictures, questions),
            whole_key=row_key(pictures, questions + answers),
        )
    if rules.with_signatures:
        drawing = replace(drawing, signature=text_signature(questions + answers))
    return drawing


def _place(digest: str) -> float:
    """A hex digest as a number from 0 to 1."""
    return int(digest[:13], 16) / 16**13


ROWS_PER_CHUNK = 500
BYTES_PER_CHUNK = 16 * 2**20
"""Whichever comes first: rows may hold pictures."""


def read_chunks(block: pa.Table) -> Iterator[pa.Table]:
    """Ray Data task: (part, source, rules) -> chunks of (numbered raw rows, is_last, source, rules), one row each.

    Where the file is broken as a whole the rows are the message, a str: the driver raises it.
    """
    for payload in block["payload"].to_pylist():
        part, source, rules = pickle.loads(payload)
        chunk: list[tuple[int, Any]] = []
        num_bytes = 0
        try:
            for number, raw in read_part(part):
                chunk.append((number, raw))
                num_bytes += _size(raw)
                if len(chunk) == ROWS_PER_CHUNK or num_bytes > BYTES_PER_CHUNK:
                    yield payload_block((chunk, False, source, rules))
                    chunk, num_bytes = [], 0
        except DataError as error:
            yield payload_block((str(error), True, source, rules))
            return
        yield payload_block((chunk, True, source, rules))


def check_chunks(block: pa.Table) -> Iterator[pa.Table]:
    """Ray Data task: each chunk of `read_chunks` -> one row, `checked` = `Checked` and is_last, or error, as JSON."""
    for payload in block["payload"].to_pylist():
        rows, is_last, source, rules = pickle.loads(payload)
        if isinstance(rows, str):
            yield pa.table({"checked": [json.dumps({"error": rows})]})
            continue
        checked = check_rows(rows, source, rules)
        bad = [vars(row) for row in checked.bad]
        found = {"samples": checked.samples, "pairs": checked.pairs, "bad": bad, "rows": len(rows), "is_last": is_last,
                 "source": f"{source.stage}/{source.place}"}  # fmt: skip
        yield pa.table({"checked": [json.dumps(found)]})


def _size(raw: Any) -> int:
    """Bytes of a raw row's texts and pictures."""
    if isinstance(raw, str | bytes):
        return len(raw)
    values = raw.values() if isinstance(raw, dict) else raw if isinstance(raw, list) else ()
    return sum(_size(value) for value in values) + 8


HELD_OUT_FIRST = ("test", "val", "train")
"""A row with several pictures goes where the most closely kept of them belongs: none of those is trained on."""


def choose_split(digest: str, val_fraction: float, test_fraction: float) -> str:
    """Split of a picture from its hex digest alone, so that one picture is never on both sides."""
    place = _place(digest)
    if place < test_fraction:
        return "test"
    return "val" if place < test_fraction + val_fraction else "train"


def _with_split(sample: Sample, rules: Rules) -> Sample:
    if sample.split != "auto":
        return sample
    digests = sample.image_sha256 or (sha256(sample.sample_id.encode()).hexdigest(),)
    splits = {choose_split(digest, rules.val_fraction, rules.test_fraction) for digest in digests}
    return replace(sample, split=min(splits, key=HELD_OUT_FIRST.index))


def _with_pictures(row: Row, given: list[str | bytes], source: Source, rules: Rules) -> Row:
    """The same row with absolute paths and digests of its pictures, all of them opened and decoded."""
    pictures = [
        _keep_picture(picture, rules) if isinstance(picture, bytes) else _check_file(source, picture, rules.limits)
        for picture in given
    ]
    paths, digests = tuple(path for path, _ in pictures), tuple(digest for _, digest in pictures)
    return replace(row, images=paths, image_sha256=digests)


def _keep_picture(data: bytes, rules: Rules) -> tuple[str, str]:
    """(path, digest) of a picture that was inside of a row: written once, under its digest.

    Raises:
        BadImage: it cannot be opened.
    """
    try:
        open_image(data, rules.limits)
    except BadImage as error:
        raise BadImage(f"image in the row: {error}") from None
    digest = sha256(data).hexdigest()
    path = Path(rules.pictures_dir) / digest[:2] / digest
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data, sync=False)
    return str(path), digest


def _check_file(source: Source, name: str, limits: ImageLimits) -> tuple[str, str]:
    """(path, digest).

    Raises:
        BadImage: naming the picture.
    """
    try:
        path = resolve_image(Path(source.image_root), name)
        status = path.stat()
    except (BadImage, OSError) as error:
        raise BadImage(f"image: {error}") from None
    digest, reason = _digest(str(path), status.st_mtime_ns, status.st_size, limits)
    if reason:
        raise BadImage(f"image {name!r}: {reason}")
    return str(path), digest


@lru_cache(maxsize=100_000)
def _digest(path: str, modified_ns: int, size: int, limits: ImageLimits) -> tuple[str, str]:
    """(digest, "") or ("", reason); remembered per process while the file stays as it is: rows share pictures."""
    try:
        return read_image(Path(path), limits)[1], ""
    except BadImage as error:
        return "", str(error)
