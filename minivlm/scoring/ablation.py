"""The table of an ablation over several seeds: accuracies with clustered intervals, paired with the baseline's rows.

Pure functions over the rows and results that evaluations write (samples.jsonl, results.json).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minivlm.scoring.statistics import PairedDifference, mean_interval, paired_difference

Row = Mapping[str, Any]
Interval = tuple[float, float, float]
"""(mean, low, high)."""

REASONING, CAPTION, YES_NO = "reasoning", "caption", "existence"


@dataclass(frozen=True)
class Evaluated:
    """One checkpoint's answers for one seed: samples.jsonl, results.json, mean tokens of a reasoning answer."""

    rows: Sequence[Row]
    results: Mapping[str, Any]
    answer_tokens: float


@dataclass(frozen=True)
class MethodFigures:
    """One line of the table, over all seeds. Accuracies are fractions; intervals are 95 %, clustered by picture."""

    name: str
    cot: Interval
    direct: Interval
    gain: PairedDifference
    """CoT accuracy minus the baseline's on the same questions."""

    gains: tuple[float, ...]
    """The same for each seed."""

    pope_f1: float
    yes_ratio: float
    chair_i: float
    caption_accuracy: float
    """Tokens of the reference caption that are reproduced."""

    answer_tokens: float


def compare_methods(methods: Mapping[str, Sequence[Evaluated]], *, baseline: str) -> list[MethodFigures]:
    """A line per method; all must have been asked the same questions, seed by seed.

    Raises:
        ValueError: other questions, or another number of seeds, than the baseline.
    """
    return [_figures(name, seeds, methods[baseline]) for name, seeds in methods.items()]


def describe_table(lines: Sequence[MethodFigures]) -> str:
    """Markdown, in per cent and points."""
    header = (
        "| method | reasoning, CoT | gain over the first | per seed | direct | POPE F1 | yes | CHAIR_i "
        "| caption tokens | answer length |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([header, *(_line(figures) for figures in lines)])


def _figures(name: str, seeds: Sequence[Evaluated], baseline: Sequence[Evaluated]) -> MethodFigures:
    if len(seeds) != len(baseline):
        raise ValueError(f"{name} was evaluated for {len(seeds)} seeds, the baseline for {len(baseline)}")
    rows = [_reasoning(evaluated.rows) for evaluated in seeds]
    before = [_reasoning(evaluated.rows) for evaluated in baseline]
    for seed, (own, other) in enumerate(zip(rows, before, strict=True)):
        if [row["question_id"] for row in own] != [row["question_id"] for row in other]:
            raise ValueError(f"{name} was asked other questions than the baseline (seed {seed})")
    clusters = [(seed, row["cluster"]) for seed, own in enumerate(rows) for row in own]
    scores = [float(row["score"]) for own in rows for row in own]
    baseline_scores = [float(row["score"]) for own in before for row in own]
    return MethodFigures(
        name=name,
        cot=mean_interval(scores, clusters),
        direct=mean_interval([float(row["variants"]["direct"]["score"]) for own in rows for row in own], clusters),
        gain=paired_difference(scores, baseline_scores, clusters),
        gains=tuple(_mean(own, "score") - _mean(other, "score") for own, other in zip(rows, before, strict=True)),
        pope_f1=_over(seeds, lambda results: results["tasks"][YES_NO]["metrics"]["f1"]),
        yes_ratio=_over(seeds, lambda results: results["tasks"][YES_NO]["metrics"]["yes_ratio"]),
        chair_i=_over(seeds, lambda results: results["caption"]["metrics"]["chair_i"]),
        caption_accuracy=_over(seeds, lambda results: results["caption"]["token_accuracy"]),
        answer_tokens=sum(evaluated.answer_tokens for evaluated in seeds) / len(seeds),
    )


def _reasoning(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["task"] == REASONING]


def _mean(rows: Sequence[Row], name: str) -> float:
    return sum(float(row[name]) for row in rows) / len(rows)


def _over(seeds: Sequence[Evaluated], figure: Callable[[Mapping[str, Any]], float]) -> float:
    return sum(float(figure(evaluated.results)) for evaluated in seeds) / len(seeds)


def _line(figures: MethodFigures) -> str:
    cells = [
        figures.name,
        _percent(figures.cot),
        _points(figures.gain),
        " ".join(f"{100 * gain:+.1f}" for gain in figures.gains),
        _percent(figures.direct),
        f"{100 * figures.pope_f1:.1f}",
        f"{100 * figures.yes_ratio:.1f}",
        f"{100 * figures.chair_i:.2f}",
        f"{100 * figures.caption_accuracy:.1f}",
        f"{figures.answer_tokens:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _percent(interval: Interval) -> str:
    mean, low, high = (100 * value for value in interval)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def _points(gain: PairedDifference) -> str:
    if gain.low is None or gain.high is None:
        return f"{100 * gain.difference:+.1f}"
    return f"{100 * gain.difference:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
