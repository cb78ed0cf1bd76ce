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
from minivlm.data.clips import Clip, ClipRules, Kept, keep_picture, open_clip, place_frames
from minivlm.data.duplicates import row_key, text_signature
from minivlm.data.errors import DataError, RowError
from minivlm.data.formats import rated_columns
from minivlm.data.images import BadImage, ImageLimits, read_image, resolve_image
from minivlm.data.ratings import Ratings, read_ratings
from minivlm.data.readers import read_part
from minivlm.data.samples import DrawColumns, pair_columns, sample_columns
from minivlm.data.sources import decode_row, first_exchange, parse_row, text_field, to_pair, to_sample
from minivlm.data.video import VideoRules
from minivlm.schema import BadRow, PreferencePair, Sample, count_placeholders

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

    `turns` is all or first: what is kept of a conversation. `with_keys` and `with_signatures` ask for what duplicates
    are found by.
    """

    limits: ImageLimits
    val_fraction: float
    test_fraction: float
    pictures_dir: str
    video: VideoRules
    turns: str
    with_keys: bool = False
    with_signatures: bool = False


@dataclass(frozen=True)
class Checked:
    """Rows of one chunk: dicts of the parquet columns, and those set aside. Of good rows the videos by their names."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    videos: list[tuple[str, Clip]] = field(default_factory=list)


def check_rows(rows: list[tuple[int, Any]], source: Source, rules: Rules) -> Checked:
    """Check numbered raw rows of one source, in order."""
    checked = Checked()
    for number, raw in rows:
        default_id = f"{Path(source.path).stem}-{number}"
        try:
            row = parse_row(raw, dict(source.columns))
            clips = _open_clips(row, source, rules)
            row = place_frames(row, clips) if clips else row
            if source.stage == "mpo":
                pair = _with_pictures(to_pair(row, default_id=default_id), row["images"], source, rules)
                drawing = _pair_drawing(pair, raw, source, rules)
                task = text_field(row, "task") or source.task
                checked.pairs.append(pair_columns(pair, source.path, number, task, drawing))
            else:
                sample = to_sample(row, stage=source.stage, split=source.split, task=source.task, default_id=default_id)
                ratings = _ratings(raw, source, _num_answers(sample))
                if rules.turns == "first":
                    sample = first_exchange(sample)
                pictures = row["images"][: count_placeholders(sample.messages)]
                sample = _with_split(_with_pictures(sample, pictures, source, rules), clips, rules)
                drawing = _sample_drawing(sample, ratings, source, rules)
                checked.samples.append(sample_columns(sample, source.path, number, drawing))
            names = (video if isinstance(video, str) else "in the row" for video in row.get("videos", ()))
            checked.videos.extend(zip(names, clips, strict=True))
        except (RowError, BadImage) as error:
            checked.bad.append(BadRow(source.path, number, str(error)))
    return checked


def _num_answers(sample: Sample) -> int:
    """A prompt has one, its `answer`."""
    return max(1, sum(message.role == "assistant" for message in sample.messages))


def _sample_drawing(sample: Sample, ratings: Ratings | None, source: Source, rules: Rules) -> DrawColumns:
    """Ratings of answers that were left out are left out too."""
    questions = [message.content for message in sample.messages if message.role == "user"]
    answers = [message.content for message in sample.messages if message.role == "assistant"]
    kept = ratings and [values and values[: _num_answers(sample)] for values in ratings]
    return _drawing(sample.image_sha256, questions, answers, kept, source, rules)


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

VIDEO_BYTES = 2**20
"""What a row that names a video counts for: decoding takes seconds."""


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
                num_bytes += _size(raw) + VIDEO_BYTES * _names_video(raw)
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


def _names_video(raw: Any) -> bool:
    if isinstance(raw, bytes):
        return b'"video' in raw
    return isinstance(raw, dict) and ("video" in raw or "videos" in raw)


HELD_OUT_FIRST = ("test", "val", "train")
"""A row with several pictures goes where the most closely kept of them belongs: none of those is trained on."""


def choose_split(digest: str, val_fraction: float, test_fraction: float) -> str:
    """Split of a picture from its hex digest alone, so that one picture is never on both sides."""
    place = _place(digest)
    if place < test_fraction:
        return "test"
    return "val" if place < test_fraction + val_fraction else "train"


def _with_split(sample: Sample, clips: list[Clip], rules: Rules) -> Sample:
    """A video counts as one picture: its frames go where its bytes belong."""
    if sample.split != "auto":
        return sample
    videos = {frame.digest: clip.digest for clip in clips for frame in clip.frames}
    digests = [videos.get(digest, digest) for digest in sample.image_sha256] or (
        sha256(sample.sample_id.encode()).hexdigest(),
    )
    splits = {choose_split(digest, rules.val_fraction, rules.test_fraction) for digest in digests}
    return replace(sample, split=min(splits, key=HELD_OUT_FIRST.index))


def _open_clips(row: dict[str, Any], source: Source, rules: Rules) -> list[Clip]:
    kept_to = ClipRules(rules.video, rules.limits, rules.pictures_dir)
    return [open_clip(video, Path(source.image_root), kept_to) for video in row.get("videos", ())]


def _with_pictures(row: Row, given: list[str | bytes | Kept], source: Source, rules: Rules) -> Row:
    """The same row with absolute paths and digests of its pictures, all of them opened and decoded."""
    kept = [_kept(picture, source, rules) for picture in given]
    return replace(
        row, images=tuple(picture.path for picture in kept), image_sha256=tuple(picture.digest for picture in kept)
    )


def _kept(picture: str | bytes | Kept, source: Source, rules: Rules) -> Kept:
    """A named file, a picture that was inside of the row, or a frame of a video.

    Raises:
        BadImage: it cannot be opened.
    """
    if isinstance(picture, Kept):
        return picture
    if isinstance(picture, str):
        return _check_file(source, picture, rules.limits)
    try:
        return keep_picture(picture, rules.limits, rules.pictures_dir)
    except BadImage as error:
        raise BadImage(f"image in the row: {error}") from None


def _check_file(source: Source, name: str, limits: ImageLimits) -> Kept:
    """The file as it is.

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
    return Kept(str(path), digest)


@lru_cache(maxsize=100_000)
def _digest(path: str, modified_ns: int, size: int, limits: ImageLimits) -> tuple[str, str]:
    """(digest, "") or ("", reason); remembered per process while the file stays as it is: rows share pictures."""
    try:
        return read_image(Path(path), limits)[1], ""
    except BadImage as error:
        return "", str(error)
