"""The figures of the report as its tables show them: leader board, tasks with their variants, further metrics.

Pure functions over what results.json and samples.jsonl hold, in the order of the checkpoints given.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from minivlm.evaluation.tasks import CAPTION
from minivlm.scoring.scorers import CAPTION_SCORERS
from minivlm.scoring.statistics import PairedDifference, paired_macro_difference

Results = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]


def leader_board(results: Sequence[Results], rows: Sequence[Rows]) -> list[dict[str, Any]]:
    """One entry per checkpoint, the best macro mean first: place in the order given, figures, and the paired difference
    of its macro mean from that of the first checkpoint given (None for that one, and where captions are all there is).
    """
    entries = []
    for place, result in enumerate(results):
        groups = [*result["tasks"].values(), *([result["caption"]] if result["caption"] else [])]
        entries.append(
            {
                "place": place,
                "result": result,
                "difference": _macro_difference(rows[place], rows[0]) if place > 0 else None,
                "num_empty": sum(group["num_empty"] for group in groups),
                "num_cut": sum(group["num_cut"] for group in groups),
            }
        )
    return sorted(entries, key=lambda entry: -1 if entry["result"]["macro"] is None else -entry["result"]["macro"])


def variant_names(results: Sequence[Results]) -> list[str]:
    """Variants that any checkpoint was asked in, in order of appearance."""
    return list(dict.fromkeys(name for result in results for name in result["variants"]))


def task_rows(results: Sequence[Results]) -> list[dict[str, Any]]:
    """One entry per task, captions last: name, what is measured, and per checkpoint its bar (None: not asked)."""
    names = sorted({task for result in results for task in result["tasks"]})
    tasks = [_task(name, [result["tasks"].get(name) for result in results], "accuracy") for name in names]
    if any(result["caption"] for result in results):
        tasks.append(_task(CAPTION, [result["caption"] for result in results], "token_accuracy"))
    return tasks


def metric_rows(tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Further figures of whole tasks (F1, CIDEr, ...): task, metric, and its value per checkpoint (None: not given)."""
    found = []
    for task in tasks:
        given = [figures["metrics"] if figures else {} for figures in task["figures"]]
        metrics = dict.fromkeys(name for own in given for name in own)
        found += [{"task": task["name"], "metric": name, "given": [own.get(name) for own in given]} for name in metrics]
    return found


def _task(name: str, figures: list[Mapping[str, Any] | None], key: str) -> dict[str, Any]:
    measures = dict.fromkeys(own["measure"] for own in figures if own)
    bars = [None if own is None else {"mean": own[key], "low": own["low"], "high": own["high"]} for own in figures]
    return {"name": name, "measure": ", ".join(measures), "figures": figures, "bars": bars}


def _macro_difference(rows: Rows, baseline: Rows) -> PairedDifference | None:
    scores: defaultdict[str, list[float]] = defaultdict(list)
    others: defaultdict[str, list[float]] = defaultdict(list)
    clusters: defaultdict[str, list[str]] = defaultdict(list)
    for ours, theirs in zip(rows, baseline, strict=True):
        if ours["scorer"] not in CAPTION_SCORERS:
            scores[ours["task"]].append(ours["score"])
            others[ours["task"]].append(theirs["score"])
            clusters[ours["task"]].append(ours["cluster"])
    return paired_macro_difference(scores, others, clusters) if clusters else None
