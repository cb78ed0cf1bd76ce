"""What was drawn, by source and by task: as numbers for mixture.json, as a table for people, and as an error where
settings leave nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minivlm.data.errors import DataError
from minivlm.data.mixture import Drawn, Fate, Rows, SourceRule, StageRule

_SETTINGS = {
    Fate.LOW_RATING: "min_rating",
    Fate.LOW_CLIP_SCORE: "min_clip_score",
    Fate.NOT_REPEATED: "repeat",
    Fate.OVER_WEIGHT: "weight",
}
"""Setting of a source that leaves out its rows."""

_STAGE_SETTINGS = {
    Fate.LEAK: "duplicates",
    Fate.DUPLICATE: "duplicates",
    Fate.NEAR_DUPLICATE: "duplicates",
    Fate.OVER_TASK: "max_draws_per_task",
}
"""Setting of the stage's mixture that does."""

ADVICE = {
    "min_rating": "Lower it",
    "min_clip_score": "Lower it",
    "repeat": "Raise it",
    "weight": "Raise it, or give this source `repeat`",
    "duplicates": "Type keep, or drop the source",
    "max_draws_per_task": "Raise it",
}


@dataclass
class RatingCounts:
    """Of one source: rows that have each column of `min_rating`, and answers left out of rows that stay."""

    rated: dict[str, int]
    low_answers: int = 0


def mixture_report(
    stage: str,
    rows: Rows,
    drawn: Drawn,
    sources: Sequence[SourceRule],
    rule: StageRule,
    tasks: Sequence[str],
    ratings: Sequence[RatingCounts],
    validated: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """Counts of one stage. Rows are different rows, draws count repeats; shares are of all draws.

    Args:
        validated: rows, bad rows and held-out rows by `STAGE/PLACE`, from summary.json.

    Raises:
        DataError: a setting leaves no row of a source or of the stage, or names a rating column that no row has.
    """
    mine = ~rows.is_held_out
    total = int(drawn.copies.sum())
    report: dict[str, Any] = {"stage": stage, "seed": rule.seed, "draws": total, "sources": [], "tasks": []}
    for place, source in enumerate(sources):
        chosen = mine & (rows.source == place)
        counts = validated.get(f"{stage}/{place}", {"rows": int(chosen.sum()), "bad": 0, "held_out": 0})
        entry = {"name": source.name, "path": source.path, **counts, **_counts(chosen, drawn, total)}
        entry["low_answers"] = ratings[place].low_answers
        entry["scores"] = _quantiles(rows.clip_score[chosen])
        report["sources"].append(entry)
        _check_source(source, entry, ratings[place], stage)
    for place, task in enumerate(tasks):
        report["tasks"].append({"name": task, **_counts(mine & (rows.task == place), drawn, total)})
    if mine.any() and not total:
        worst = max(_STAGE_SETTINGS, key=lambda fate: int((drawn.fate[mine] == fate).sum()))
        raise DataError(_no_row(f"data.mixture.{stage}", _STAGE_SETTINGS[worst], "stage", int(mine.sum())))
    return report


def mixture_lines(report: Mapping[str, Any]) -> list[str]:
    """The table of one stage: a line per source and per task, columns only where something was left out."""
    entries = [*report["sources"], *report["tasks"]]
    shown = ["rows", "bad", "held_out", "train"]
    shown += [name for name in (*_FATES, "low_answers") if any(entry.get(name) for entry in entries)]
    shown += ["drawn", "draws"]
    header = f"{report['stage']:<24}" + "".join(f"{name:>{_width(name)}}" for name in shown) + f"{'share':>8}"
    lines = [header]
    for entry in entries:
        cells = "".join(f"{entry.get(name, ''):>{_width(name)}}" for name in shown)
        lines.append(f"{entry['name'][:23]:<24}{cells}{entry['share']:>8.1%}")
    return lines


_FATES = [fate.name.lower() for fate in Fate if fate is not Fate.DRAWN]


def _width(name: str) -> int:
    return max(len(name), 8) + 2


def _counts(chosen: np.ndarray, drawn: Drawn, total: int) -> dict[str, Any]:
    fates = np.bincount(drawn.fate[chosen], minlength=len(Fate)).tolist()
    draws = int(drawn.copies[chosen].sum())
    named = {fate.name.lower(): fates[fate] for fate in Fate if fate is not Fate.DRAWN}
    return {
        "train": int(chosen.sum()),
        **named,
        "drawn": fates[Fate.DRAWN],
        "draws": draws,
        "repeats": draws - fates[Fate.DRAWN],
        "share": round(draws / total, 6) if total else 0.0,
    }


def _quantiles(scores: np.ndarray) -> dict[str, float] | None:
    """Of the CLIP scores of a source's rows, to choose a threshold by."""
    known = scores[~np.isnan(scores)]
    if not len(known):
        return None
    return {f"{q}%": round(float(np.quantile(known, q / 100)), 4) for q in (1, 5, 25, 50, 75, 95, 99)}


def _check_source(source: SourceRule, entry: Mapping[str, Any], ratings: RatingCounts, stage: str) -> None:
    for column, count in ratings.rated.items():
        if entry["train"] and not count:
            raise DataError(f"{source.name}.min_rating names {column!r}, which no row of {source.path} has. Correct it")
    if source.weight is not None and not entry["train"]:
        raise DataError(f"{source.name}.weight: {source.path} has no training row. Type `split: train`, or remove it")
    if entry["train"] and not entry["drawn"]:
        worst = max((*_SETTINGS, *_STAGE_SETTINGS), key=lambda fate: int(entry[fate.name.lower()]))
        if worst in _SETTINGS:
            scores = f"; its scores by share of rows: {entry['scores']}" if worst == Fate.LOW_CLIP_SCORE else ""
            raise DataError(_no_row(source.name, _SETTINGS[worst], source.path, entry["train"]) + scores)
        if source.weight is not None:
            raise DataError(_no_row(f"data.mixture.{stage}", _STAGE_SETTINGS[worst], source.path, entry["train"]))


def _no_row(section: str, setting: str, what: str, count: int) -> str:
    return f"{section}.{setting} leaves none of the {count} training rows of {what}. {ADVICE[setting]}"
