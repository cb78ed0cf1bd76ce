"""Which rows a stage trains on, and how often: from a few numbers per row to a count per row and its reason.

The rules apply in this order, each to what the ones before left: ratings, CLIP score, duplicates, rows per picture,
`max_rows`, `repeat`, draws per task, weights. Rows are taken in the order source, file, row, and every choice ranks
them by a number made of the seed, the file's name and the row: so the draw does not depend on the order of reading.
Pure: numpy alone. `minivlm.data.draw` gathers the numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from hashlib import blake2b
from pathlib import PurePath

import numpy as np

from minivlm.data.duplicates import mix_bits, near_duplicates


class Fate(IntEnum):
    """What became of a row. The values are the columns of the table, in the order of the rules."""

    DRAWN = 0
    LOW_RATING = 1
    LOW_CLIP_SCORE = 2
    LEAK = 3
    """Asks the question of a val or test row about the same pictures."""
    DUPLICATE = 4
    NEAR_DUPLICATE = 5
    OVER_PICTURE = 6
    OVER_MAX_ROWS = 7
    NOT_REPEATED = 8
    """Left out by a `repeat` below 1."""
    OVER_TASK = 9
    OVER_WEIGHT = 10


@dataclass(frozen=True, eq=False)
class Rows:
    """Numbers of n rows: the training rows of a stage and, where duplicates count, the held-out rows of all stages.

    About 60 bytes a row, and 120 more with signatures. Keys are those of `minivlm.data.duplicates`, 0 where not asked
    for; `pictures` is also 0 for rows without any.
    """

    source: np.ndarray
    """int32, place among the sources of the stage."""
    file: np.ndarray
    """int32, place in the list of paths."""
    row: np.ndarray
    """int64, number in its file."""
    task: np.ndarray
    """int32, place in the list of tasks."""
    repeat: np.ndarray
    """float64, the file's own repeat_time."""
    pictures: np.ndarray
    question: np.ndarray
    whole: np.ndarray
    """uint64 keys: of the pictures, of pictures and questions, of pictures and all texts."""
    is_held_out: np.ndarray
    is_low_rated: np.ndarray
    clip_score: np.ndarray
    """float32, NaN where there is none."""
    signatures: np.ndarray
    """[n, SIGNATURE_BYTES] uint8, or [n, 0]."""

    def take(self, order: np.ndarray) -> "Rows":
        """These rows in another order."""
        return Rows(*(getattr(self, item.name)[order] for item in fields(self)))

    @staticmethod
    def join(parts: Sequence["Rows"]) -> "Rows":
        """One after another; at least one."""
        return Rows(*(np.concatenate([getattr(part, item.name) for part in parts]) for item in fields(Rows)))


@dataclass(frozen=True)
class SourceRule:
    """Settings of one source, as in `config.data.SourceConfig`, and what messages and the table call it."""

    name: str = ""
    path: str = ""
    weight: float | None = None
    max_rows: int | None = None
    repeat: float = 1.0
    min_rating: tuple[tuple[str, float], ...] = ()
    """(column, threshold), sorted."""
    min_clip_score: float | None = None


@dataclass(frozen=True)
class StageRule:
    """Settings of one stage, as in `config.data.StageMixture`."""

    seed: int = 0
    duplicates: str = "keep"
    near_similarity: float = 0.8
    across_pictures: bool = False
    max_rows_per_picture: int | None = None
    max_draws_per_task: int | None = None
    task_exponent: float = 0.0


@dataclass(frozen=True, eq=False)
class Drawn:
    """For each row given: how often it is drawn (int64, 0 for held-out rows) and its Fate (uint8)."""

    copies: np.ndarray
    fate: np.ndarray


def draw(rows: Rows, files: Sequence[str], sources: Sequence[SourceRule], rule: StageRule) -> Drawn:
    """Draw the training rows of one stage.

    Args:
        rows: in any order; the result has the same.
        files: what `rows.file` counts.
        sources: what `rows.source` counts.
    """
    by_path = np.argsort(np.argsort(np.array(files, dtype=object)))[rows.file] if files else rows.file
    order = np.lexsort((rows.repeat, rows.row, by_path, rows.source, ~rows.is_held_out))
    sorted_rows = rows.take(order)
    fate = np.full(len(order), Fate.DRAWN, np.uint8)
    priority = _priorities(sorted_rows, files, rule.seed)
    _leave_low_quality(sorted_rows, fate, sources)
    _leave_duplicates(sorted_rows, fate, rule)
    _leave_over_picture(sorted_rows, fate, rule)
    _leave_over_max_rows(sorted_rows, fate, sources, priority)
    copies = _repeat(sorted_rows, fate, sources, priority)
    if rule.max_draws_per_task is not None:
        drawn = np.bincount(sorted_rows.task, weights=copies)
        limits = task_limits(drawn, rule.max_draws_per_task, rule.task_exponent)
        copies = _thin(copies, sorted_rows.task, limits, priority, fate, Fate.OVER_TASK)
    drawn = np.bincount(sorted_rows.source, weights=copies, minlength=len(sources))
    limits = weighted_limits(drawn, [source.weight for source in sources])
    copies = _thin(copies, sorted_rows.source, limits, priority, fate, Fate.OVER_WEIGHT)
    given = np.empty_like(order)
    given[order] = np.arange(len(order))
    return Drawn(copies[given], fate[given])


def task_limits(draws: np.ndarray, limit: int, exponent: float) -> np.ndarray:
    """Draws of each task after thinning: those above K become K (n/K)^exponent, rounded down.

    Source: with exponent 0 the artificial limit of examples-proportional mixing, Raffel et al. 2020, arXiv:1910.10683,
    section 3.5.2; between 0 and 1 the temperature 1/exponent of the same section, above the limit only.
    """
    softened = limit * (np.maximum(draws, limit) / limit) ** exponent
    return np.floor(np.minimum(draws, softened) + 1e-9).astype(np.int64)


def weighted_limits(draws: np.ndarray, weights: Sequence[float | None]) -> np.ndarray:
    """Draws of each source, in the ratio of the weights to within half a row; the scarcest keeps all.

    Sources without weight keep all, too; those without draws count as if they were not there.
    """
    weighted = [place for place, weight in enumerate(weights) if weight is not None and draws[place]]
    limits = draws.astype(np.int64)
    if weighted:
        shares = np.array([weights[place] for place in weighted], np.float64)
        unit = (draws[weighted] / shares).min()
        limits[weighted] = np.minimum(limits[weighted], np.floor(unit * shares + 0.5).astype(np.int64))
    return limits


def _priorities(rows: Rows, files: Sequence[str], seed: int) -> np.ndarray:
    """uint64 of each row, from the seed, the name of its file and its number alone."""
    names = [blake2b(f"{seed}/{PurePath(file).name}".encode(), digest_size=8).digest() for file in files]
    places = np.array([int.from_bytes(name, "little") for name in names], np.uint64)
    if not len(places):
        return np.zeros(len(rows.row), np.uint64)
    return mix_bits(mix_bits(rows.row.astype(np.uint64)) ^ places[rows.file])


def _leave_low_quality(rows: Rows, fate: np.ndarray, sources: Sequence[SourceRule]) -> None:
    least = np.array([-np.inf if s.min_clip_score is None else s.min_clip_score for s in sources] or [-np.inf])
    with np.errstate(invalid="ignore"):
        is_low = rows.clip_score < least[np.minimum(rows.source, len(least) - 1)]
    fate[is_low & ~rows.is_held_out] = Fate.LOW_CLIP_SCORE
    fate[rows.is_low_rated & ~rows.is_held_out] = Fate.LOW_RATING


def _leave_duplicates(rows: Rows, fate: np.ndarray, rule: StageRule) -> None:
    """Rows come sorted, held-out ones first: the first of equal rows stays."""
    if rule.duplicates == "keep":
        return
    held_out = rows.is_held_out
    leaks = np.isin(rows.question, np.unique(rows.question[held_out])) & ~held_out
    fate[leaks & (fate == Fate.DRAWN)] = Fate.LEAK
    alive = np.flatnonzero((fate == Fate.DRAWN) & ~held_out)
    fate[alive[_ranks(rows.whole[alive]) > 0]] = Fate.DUPLICATE
    if rule.duplicates == "drop_near":
        alive = np.flatnonzero(fate == Fate.DRAWN)
        groups = np.zeros(len(alive), np.uint64) if rule.across_pictures else rows.pictures[alive]
        found = near_duplicates(
            rows.signatures[alive], groups, similarity=rule.near_similarity, always_kept=held_out[alive]
        )
        fate[alive[found]] = Fate.NEAR_DUPLICATE


def _leave_over_picture(rows: Rows, fate: np.ndarray, rule: StageRule) -> None:
    if rule.max_rows_per_picture is not None:
        alive = np.flatnonzero((fate == Fate.DRAWN) & ~rows.is_held_out & (rows.pictures != 0))
        fate[alive[_ranks(rows.pictures[alive]) >= rule.max_rows_per_picture]] = Fate.OVER_PICTURE


def _leave_over_max_rows(rows: Rows, fate: np.ndarray, sources: Sequence[SourceRule], priority: np.ndarray) -> None:
    for place, source in enumerate(sources):
        if source.max_rows is not None:
            alive = np.flatnonzero((fate == Fate.DRAWN) & ~rows.is_held_out & (rows.source == place))
            over = _ranks(np.zeros(len(alive), np.int32), priority[alive]) >= source.max_rows
            fate[alive[over]] = Fate.OVER_MAX_ROWS


def _repeat(rows: Rows, fate: np.ndarray, sources: Sequence[SourceRule], priority: np.ndarray) -> np.ndarray:
    """How often each row is used. The fraction of `repeat` is the share of its rows that is used once more."""
    alive = np.flatnonzero((fate == Fate.DRAWN) & ~rows.is_held_out)
    repeats = np.array([source.repeat for source in sources] or [1.0])[rows.source[alive]] * rows.repeat[alive]
    group = np.unique(repeats, return_inverse=True)[1]
    group = group * max(len(sources), 1) + rows.source[alive]
    whole = np.floor(repeats).astype(np.int64)
    extra = np.floor((repeats - whole) * np.bincount(group)[group] + 0.5) if len(group) else repeats
    copies = np.zeros(len(fate), np.int64)
    copies[alive] = whole + (_ranks(group, priority[alive]) < extra)
    fate[alive[copies[alive] == 0]] = Fate.NOT_REPEATED
    return copies


def _thin(
    copies: np.ndarray, group: np.ndarray, limits: np.ndarray, priority: np.ndarray, fate: np.ndarray, left: Fate
) -> np.ndarray:
    """Copies with at most limits[g] in group g: further copies of a row go first, then whole rows."""
    if (np.bincount(group, weights=copies, minlength=len(limits)) <= limits).all():
        return copies
    entries = np.repeat(np.arange(len(copies)), copies)
    number = np.arange(len(entries)) - np.repeat(np.cumsum(copies) - copies, copies)
    kept = _ranks(group[entries], number, priority[entries]) < limits[group[entries]]
    thinned = np.bincount(entries[kept], minlength=len(copies))
    fate[(thinned == 0) & (copies > 0)] = left
    return thinned


def _ranks(group: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """Place of each row in its group, from 0, ordered by the keys and then as given."""
    order = np.lexsort((*reversed(keys), group))
    in_order = group[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = in_order[1:] != in_order[:-1]
    starts = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order)) - starts
    return ranks
