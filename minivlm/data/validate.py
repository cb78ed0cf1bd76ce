"""One chunk of raw rows -> checked samples and pairs, or the reason why not. Called in Ray Data tasks.

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

from minivlm.data.images import BadImage, ImageLimits, read_image, resolve_image
from minivlm.data.samples import pair_columns, sample_columns
from minivlm.data.sources import RowError, parse_row, to_pair, to_sample
from minivlm.schema import BadRow, PreferencePair, Sample

Row = TypeVar("Row", Sample, PreferencePair)


@dataclass(frozen=True)
class Source:
    """One annotation file and how its rows are read. `stage` is pretrain, sft, prompts or mpo."""

    path: str
    image_root: str
    stage: str
    split: str
    task: str


@dataclass(frozen=True)
class Rules:
    """What a row must keep to, and how rows without a split get one."""

    limits: ImageLimits
    val_fraction: float
    test_fraction: float


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
            row = parse_row(raw)
            if source.stage == "mpo":
                pair = _with_pictures(to_pair(row, default_id=default_id), source, rules)
                checked.pairs.append(pair_columns(pair, source.path, number))
            else:
                sample = to_sample(row, stage=source.stage, split=source.split, task=source.task, default_id=default_id)
                sample = _with_split(_with_pictures(sample, source, rules), rules)
                checked.samples.append(sample_columns(sample, source.path, number))
        except (RowError, BadImage) as error:
            checked.bad.append(BadRow(source.path, number, str(error)))
    return checked


def check_chunk(block: pa.Table) -> Iterator[pa.Table]:
    """`check_rows` as a Ray Data task on its pickled arguments: one row, `checked` = the result as JSON."""
    for payload in block["payload"].to_pylist():
        checked = check_rows(*pickle.loads(payload))
        bad = [vars(row) for row in checked.bad]
        yield pa.table({"checked": [json.dumps({"samples": checked.samples, "pairs": checked.pairs, "bad": bad})]})


HELD_OUT_FIRST = ("test", "val", "train")
"""A row with several pictures goes where the most closely kept of them belongs: none of those is trained on."""


def choose_split(digest: str, val_fraction: float, test_fraction: float) -> str:
    """Split of a picture from its hex digest alone, so that one picture is never on both sides."""
    place = int(digest[:13], 16) / 16**13
    if place < test_fraction:
        return "test"
    return "val" if place < test_fraction + val_fraction else "train"


def _with_split(sample: Sample, rules: Rules) -> Sample:
    if sample.split != "auto":
        return sample
    digests = sample.image_sha256 or (sha256(sample.sample_id.encode()).hexdigest(),)
    splits = {choose_split(digest, rules.val_fraction, rules.test_fraction) for digest in digests}
    return replace(sample, split=min(splits, key=HELD_OUT_FIRST.index))


def _with_pictures(row: Row, source: Source, rules: Rules) -> Row:
    """The same row with absolute paths, and digests of files that were opened and decoded."""
    pictures = [_check_picture(source.image_root, name, rules.limits) for name in row.images]
    paths, digests = tuple(path for path, _ in pictures), tuple(digest for _, digest in pictures)
    return replace(row, images=paths, image_sha256=digests)


def _check_picture(root: str, name: str, limits: ImageLimits) -> tuple[str, str]:
    """(path, digest).

    Raises:
        BadImage: naming the picture.
    """
    try:
        path = resolve_image(Path(root), name)
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
