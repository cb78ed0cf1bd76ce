"""Evaluation results as people see them: a table for the terminal, sample rows for the MLflow panel."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minivlm.config import Config
from minivlm.data.settings import image_limits
from minivlm.evaluation.compare import comparison_lines
from minivlm.evaluation.report import choose_samples, thumbnail_uri
from minivlm.evaluation.results import read_results, read_rows


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy in per cent per task and model, the shuffled score in brackets (captions by tokens); then each model's
    difference from the baseline."""
    header = f"{'task':<14}{'n':>6}" + "".join(f"{result['name'] + ' (shuffled)':>20}" for result in results)
    lines = [header]
    for task, figures in results[-1]["tasks"].items():
        cells = [result["tasks"][task] for result in results]
        lines.append(_line(task, figures["n"], [(cell["accuracy"], _shuffled(cell)) for cell in cells]))
    if caption := results[-1]["caption"]:
        cells = [(result["caption"]["token_accuracy"], _shuffled(result["caption"])) for result in results]
        lines.append(_line("caption", caption["n"], cells))
    if results[-1]["macro"] is not None:
        cells = [(result["macro"], result["shuffled_macro"]) for result in results]
        lines.append(_line("macro", results[-1]["macro_questions"], cells))
    return "\n".join([*lines, *comparison_lines(results)])


def sample_rows(config: Config, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Questions with pictures as data URIs, the truth, and each checkpoint's answer; failures of the last one first."""
    names = [read_results(folder)["name"] for folder in folders]
    rows = [read_rows(folder) for folder in folders]
    limits = image_limits(config)
    return [
        {
            "task": rows[-1][index]["task"],
            "pictures": [thumbnail_uri(path, limits) for path in rows[-1][index]["images"]],
            "question": rows[-1][index]["question"],
            "truth": rows[-1][index]["truth"],
            **{name: rows[i][index]["answer"] for i, name in enumerate(names)},
        }
        for index in choose_samples(rows[-1], config.evaluation.report_samples_per_task)
    ]


def _line(name: str, count: int, cells: Sequence[tuple[float | None, float | None]]) -> str:
    return f"{name:<14}{count:>6}" + "".join(f"{_percent(a) + ' (' + _percent(b) + ')':>20}" for a, b in cells)


def _shuffled(figures: Mapping[str, Any]) -> float | None:
    accuracy: float | None = figures["variants"].get("shuffled", {}).get("accuracy")
    return accuracy


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
