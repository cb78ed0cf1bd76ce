"""Benchmarks of the configuration -> questions of the evaluation job, and an account of the rows that were set aside.

A file is read twice: first without keeping pictures, to find duplicates and to choose; then the chosen rows' pictures
are opened, as those of training rows are. What cannot be asked is named, counted and never scored.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from minivlm import layout
from minivlm.config import Config
from minivlm.config.benchmarks import BenchmarkConfig
from minivlm.data.clips import Kept, keep_picture
from minivlm.data.errors import DataError, RowError
from minivlm.data.images import BadImage, ImageLimits, read_image, resolve_image
from minivlm.data.settings import image_limits
from minivlm.data.sources import CHINESE
from minivlm.evaluation.benchmarks.files import mme_rows, raw_rows, vqav2_rows
from minivlm.evaluation.benchmarks.rows import NUMBER, READ, Picture, Row, check_row
from minivlm.evaluation.tasks import Question, shuffle_pictures
from minivlm.log import get_logger
from minivlm.schema import IMAGE_PLACEHOLDER, BadRow, Message
from minivlm.scoring.scorers import SCORERS
from minivlm.storage import write_bytes

_log = get_logger(__name__)

CountTokens = Callable[[Sequence[Message]], int]
BenchmarkAccount = dict[str, dict[str, Any]]
"""By task name: {file, rows, asked, bad, reasons}."""

LIST_KEYS = {"textvqa": "data", "docvqa": "data", "infovqa": "data", "coco_captions": "images"}
SPLITS = ("scienceqa", "coco_captions")
"""Kinds whose file holds several splits."""


@dataclass(frozen=True)
class Loaded:
    """Questions of one benchmark, rows that were set aside, and how many of the split the file has.

    `bad_share` adds the share of all rows that cannot be read and of the chosen ones whose pictures cannot be opened.
    """

    questions: list[Question]
    bad: list[BadRow]
    rows: int
    bad_share: float


def load_benchmarks(
    config: Config, *, taken: Collection[str], count_tokens: CountTokens
) -> tuple[list[Question], BenchmarkAccount]:
    """Questions of every benchmark, with shuffled pictures as those of the test split.

    Args:
        taken: task names of the test split.
        count_tokens: tokens of a prompt with its pictures.

    Returns:
        The questions, and what became of the rows.

    Raises:
        DataError: a file is missing or broken as a whole, a name is taken, nothing can be asked, or a larger share of
            rows is bad than evaluation.max_bad_fraction allows.
    """
    questions: list[Question] = []
    account: BenchmarkAccount = {}
    for benchmark in config.evaluation.benchmarks:
        if benchmark.task in account or benchmark.task in taken:
            raise DataError(
                f"two tasks are called `{benchmark.task}`: add `name` to that benchmark of evaluation.benchmarks"
            )
        loaded = load_benchmark(
            benchmark,
            limits=image_limits(config),
            pictures_dir=layout.pictures_dir(config),
            max_questions=config.evaluation.max_questions_per_task,
            seed=config.seed,
            count_tokens=count_tokens,
            max_tokens=config.model.max_length_tokens,
        )
        _check(config, benchmark, loaded)
        questions += loaded.questions
        reasons = Counter(_kind_of(bad.reason) for bad in loaded.bad)
        account[benchmark.task] = {
            "file": str(benchmark.path), "rows": loaded.rows, "asked": len(loaded.questions), "bad": len(loaded.bad),
            "reasons": dict(reasons.most_common(20)),
        }  # fmt: skip
    return shuffle_pictures(questions, seed=config.seed), account


def load_benchmark(
    benchmark: BenchmarkConfig,
    *,
    limits: ImageLimits,
    pictures_dir: Path,
    max_questions: int | None,
    seed: int,
    count_tokens: CountTokens,
    max_tokens: int,
) -> Loaded:
    """Read one benchmark; see the file's docstring.

    Args:
        pictures_dir: where pictures go that lie inside of rows.
        max_questions: a seeded choice of so many, MME's pairs together; None = all.
        count_tokens: tokens of a prompt; one of more than `max_tokens` is not asked.
    """
    kept: dict[int, tuple[str, str]] = {}
    bad: dict[int, str] = {}
    first: dict[str, int] = {}
    for number, row in _rows(benchmark):
        if isinstance(row, str):
            bad[number] = row
        elif row.question_id in first:
            bad[number] = f"id {row.question_id[:80]!r} stands twice, first in row {first[row.question_id]}"
        else:
            first[row.question_id] = number
            kept[number] = (row.question_id, row.group if row.scorer == "mme" else row.question_id)
    total = len(kept) + len(bad)
    chosen = _choose(kept, max_questions, f"{seed}/{benchmark.task}")
    root = (benchmark.images or (benchmark.path if benchmark.path.is_dir() else benchmark.path.parent)).expanduser()
    questions = []
    for number, row in _rows(benchmark) if chosen else ():
        if number not in chosen or isinstance(row, str):
            continue
        try:
            pictures = [_open(picture, root, limits, str(pictures_dir)) for picture in row.pictures]
        except BadImage as error:
            bad[number] = str(error)
            continue
        question = _question(benchmark, row, pictures)
        tokens = count_tokens(question.messages)
        if tokens > max_tokens:
            bad[number] = f"a prompt of {tokens} tokens, more than model.max_length_tokens={max_tokens}"
        else:
            questions.append(question)
    unreadable = len(bad) - (len(chosen) - len(questions))
    share = unreadable / max(1, total) + (len(chosen) - len(questions)) / max(1, len(chosen))
    file = str(benchmark.path)
    return Loaded(questions, [BadRow(file, number, bad[number]) for number in sorted(bad)], total, share)


def count_rows(benchmark: BenchmarkConfig) -> tuple[int, int]:
    """(rows of the split, those that cannot be asked whatever their pictures are), without opening a picture.

    Raises:
        DataError: the file is missing or broken as a whole.
    """
    readable = [isinstance(row, Row) for _, row in _rows(benchmark)]
    return len(readable), len(readable) - sum(readable)


def _rows(benchmark: BenchmarkConfig) -> Iterator[tuple[int, Row | str]]:
    """Numbered rows of the split, or why one cannot be asked."""
    wanted = (benchmark.split or "test") if benchmark.kind in SPLITS else None
    for number, raw in _raw(benchmark):
        try:
            if isinstance(raw, RowError):
                raise raw
            if wanted is not None and raw.get("split", wanted) != wanted:
                continue
            row = check_row(READ[benchmark.kind](raw | {NUMBER: number}))
            reason = SCORERS[row.scorer].unfit(row.truths, row.choices)
            yield number, reason or row
        except (RowError, BadImage) as error:
            yield number, str(error)


def _raw(benchmark: BenchmarkConfig) -> Iterator[tuple[int, Any]]:
    path = benchmark.path.expanduser()
    if benchmark.annotations is not None:
        return vqav2_rows(path, benchmark.annotations.expanduser())
    if benchmark.kind == "mme" and path.is_dir() and not any(path.glob("*.parquet")):
        return mme_rows(path)
    return raw_rows(path, LIST_KEYS.get(benchmark.kind, "data"))


def _choose(kept: dict[int, tuple[str, str]], count: int | None, seed: str) -> set[int]:
    """Numbers of the rows to ask: whole groups in a random order, as long as they fit."""
    if count is None or len(kept) <= count:
        return set(kept)
    groups: dict[str, list[int]] = {}
    for number, (_, group) in kept.items():
        groups.setdefault(group, []).append(number)
    names = sorted(groups)
    Random(seed).shuffle(names)
    chosen: set[int] = set()
    for name in names:
        if len(chosen) + len(groups[name]) <= count:
            chosen |= set(groups[name])
    return chosen


def _open(picture: Picture, root: Path, limits: ImageLimits, pictures_dir: str) -> Kept:
    """A named file, or a picture inside of the row, which is kept under its digest.

    Raises:
        BadImage: naming the picture.
    """
    if isinstance(picture, bytes):
        try:
            return keep_picture(picture, limits, pictures_dir)
        except BadImage as error:
            raise BadImage(f"image in the row: {error}") from None
    try:
        path = resolve_image(root, picture)
        status = path.stat()
        digest = _digest(str(path), status.st_mtime_ns, status.st_size, limits)
    except (BadImage, OSError) as error:
        raise BadImage(f"image: {error}") from None
    return Kept(str(path), digest)


@lru_cache(maxsize=100_000)
def _digest(path: str, modified_ns: int, size: int, limits: ImageLimits) -> str:
    """Remembered while the file stays as it is: questions share pictures."""
    return read_image(Path(path), limits)[1]


def _question(benchmark: BenchmarkConfig, row: Row, pictures: Sequence[Kept]) -> Question:
    text = f"{IMAGE_PLACEHOLDER}\n" * len(pictures) + row.text
    return Question(
        question_id=f"{benchmark.task}/{row.question_id}",
        task=benchmark.task,
        language="zh" if CHINESE.search(row.text) else "en",
        images=tuple(picture.path for picture in pictures),
        image_sha256=tuple(picture.digest for picture in pictures),
        messages=(Message("user", text),),
        reference=row.truths[0],
        truth=row.truths[0],
        scorer=row.scorer,
        truths=row.truths,
        choices=row.choices,
        group=row.group,
        source=benchmark.kind,
    )


def _check(config: Config, benchmark: BenchmarkConfig, loaded: Loaded) -> None:
    """Log what was set aside, once; refuse too much of it."""
    if not loaded.bad:
        if not loaded.questions:
            raise DataError(f"{benchmark.path} has no row to ask: correct `path` or `split` of that benchmark")
        return
    lines = "".join(json.dumps(vars(bad), ensure_ascii=False) + "\n" for bad in loaded.bad)
    file = config.root / "benchmarks" / f"{benchmark.task}.quarantine.jsonl"
    write_bytes(file, lines.encode("utf-8", "replace"))
    count, first = len(loaded.bad), loaded.bad[0]
    said = f"{benchmark.task}: {count} of {loaded.rows} rows cannot be asked. First: {first.file}, row {first.row}: "
    said += f"{first.reason}. All of them: {file}"
    limit = config.evaluation.max_bad_fraction
    if not loaded.questions:
        raise DataError(f"{said}. None is left. Correct the file, or `images` of that benchmark")
    if loaded.bad_share > limit:
        raise DataError(
            f"{said}. That is more than evaluation.max_bad_fraction={limit:g} allows. Correct the file, or "
            f"accept the loss by evaluation.max_bad_fraction={min(1.0, loaded.bad_share + 0.005):.2f}"
        )
    _log.warning("%s", said)


def _kind_of(reason: str) -> str:
    """A reason without what is particular to the row."""
    return reason.split(":")[0].split("'")[0].strip()[:60]
