"""Each evaluated model against a baseline, question by question: the `comparisons` of results.json, and their table."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minivlm.config import ConfigError
from minivlm.evaluation.results import read_results, read_rows
from minivlm.evaluation.tasks import CAPTION
from minivlm.scoring.scorers import CAPTION_SCORERS
from minivlm.scoring.statistics import paired_difference, paired_macro_difference
from minivlm.storage import write_json

Row = Mapping[str, Any]


def check_names(names: Sequence[str]) -> list[str]:
    """The names of all models, each once.

    Raises:
        ConfigError: two models of one name.
    """
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two models are called `{twice[0]}`: give evaluation.exports.{twice[0]} another name")
    return list(names)


def choose_baseline(names: Sequence[str], asked: str | None) -> str:
    """The model that the others are compared with: the one asked for; else `sft` where there is one, else the first.

    Raises:
        ConfigError: the one asked for is not evaluated.
    """
    if asked is None:
        return "sft" if "sft" in names else names[0]
    if asked not in names:
        raise ConfigError(f"evaluation.baseline={asked} is not among what is evaluated: type one of {', '.join(names)}")
    return asked


def compare_runs(rows: Sequence[Row], baseline: Sequence[Row]) -> dict[str, Any]:
    """Paired differences (fields of `PairedDifference`): by task, of captions, and of the macro mean without
    captions, as results.json has them.

    Args:
        rows, baseline: scored questions of the two models; the same questions in the same order.

    Raises:
        ConfigError: other questions.
    """
    if [row["question_id"] for row in rows] != [row["question_id"] for row in baseline]:
        raise ConfigError("models that answered different questions cannot be compared: evaluate both with one command")
    ours: defaultdict[str, list[float]] = defaultdict(list)
    theirs: defaultdict[str, list[float]] = defaultdict(list)
    clusters: defaultdict[str, list[str]] = defaultdict(list)
    captions: set[str] = set()
    for row, other in zip(rows, baseline, strict=True):
        task = row["task"]
        ours[task].append(row["score"])
        theirs[task].append(other["score"])
        clusters[task].append(row["cluster"])
        if row["scorer"] in CAPTION_SCORERS:
            captions.add(task)
    found = {task: asdict(paired_difference(ours[task], theirs[task], clusters[task])) for task in sorted(ours)}
    for task in captions:
        del ours[task], theirs[task], clusters[task]
    return {
        "macro": asdict(paired_macro_difference(ours, theirs, clusters)) if ours else None,
        "caption": found.pop(CAPTION, None),
        "tasks": found,
    }


def write_comparisons(folders: Sequence[Path], baseline: str) -> None:
    """Write into each results.json how the model compares with the baseline; into the baseline's own, nothing."""
    results = [read_results(folder) for folder in folders]
    place = next(i for i, result in enumerate(results) if result["name"] == baseline)
    theirs = read_rows(folders[place])
    for number, (folder, result) in enumerate(zip(folders, results, strict=True)):
        compared: dict[str, Any] = {}
        if number != place:
            found = compare_runs(read_rows(folder), theirs)
            compared = {baseline: {"reference": results[place]["reference"], **found}}
        if result["comparisons"] != compared:
            write_json(folder / "results.json", result | {"comparisons": compared})


def comparison_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """For the terminal, in points of a hundred: difference, 95 % interval, p-value, smallest difference to be seen."""
    lines: list[str] = []
    for result in results:
        for baseline, found in result["comparisons"].items():
            title = f"{result['name']} - {baseline}"
            lines += ["", f"{title:<24}{'points':>8}{'95 % interval':>20}{'p':>9}{'could show':>12}"]
            figures = found["tasks"] | {CAPTION: found["caption"], "macro": found["macro"]}
            lines += [_line(name, paired) for name, paired in figures.items() if paired is not None]
    return lines


def _line(name: str, paired: Mapping[str, Any]) -> str:
    points = f"{name:<24}{100 * paired['difference']:>+8.1f}"
    if paired["error"] is None:
        return points + "   one picture: nothing can be said"
    interval = f"{100 * paired['low']:+.1f} to {100 * paired['high']:+.1f}"
    smallest = paired["minimum_difference"]
    shown = "-" if smallest is None else f"{100 * smallest:.1f}"
    return f"{points}{interval:>20}{paired['p_value']:>9.4f}{shown:>12}"
