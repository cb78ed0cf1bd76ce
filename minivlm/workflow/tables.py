"""Evaluation results as people see them: a table for the terminal, sample rows for the MLflow panel."""

from collections.abc import Mapping, Sequence
from typing import Any

from minivlm.config import Config, StageName
from minivlm.data.settings import image_limits
from minivlm.evaluation.report import choose_samples, thumbnail_uri
from minivlm.evaluation.results import read_rows


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy in per cent per task and stage, the shuffled score in brackets; captions by tokens."""
    header = f"{'task':<14}{'n':>6}" + "".join(f"{result['stage'] + ' (shuffled)':>20}" for result in results)
    lines = [header]
    for task, figures in results[-1]["tasks"].items():
        cells = [result["tasks"][task] for result in results]
        lines.append(_line(task, figures["n"], [(cell["accuracy"], cell["shuffled"]) for cell in cells]))
    if caption := results[-1]["caption"]:
        cells = [(result["caption"]["token_accuracy"], result["caption"]["shuffled"]) for result in results]
        lines.append(_line("caption", caption["n"], cells))
    if results[-1]["macro"] is not None:
        cells = [(result["macro"], result["shuffled_macro"]) for result in results]
        lines.append(_line("macro", results[-1]["num_questions"], cells))
    return "\n".join(lines)


def sample_rows(config: Config, stages: Sequence[StageName]) -> list[dict[str, Any]]:
    """Questions with pictures as data URIs, the truth, and each stage's answer; failures of the last stage first."""
    rows = [read_rows(config, stage) for stage in stages]
    limits = image_limits(config)
    return [
        {
            "task": rows[-1][index]["task"],
            "pictures": [thumbnail_uri(path, limits) for path in rows[-1][index]["images"]],
            "question": rows[-1][index]["question"],
            "truth": rows[-1][index]["truth"],
            **{stage: rows[i][index]["answer"] for i, stage in enumerate(stages)},
        }
        for index in choose_samples(rows[-1], config.evaluation.report_samples_per_task)
    ]


def _line(name: str, count: int, cells: Sequence[tuple[float | None, float | None]]) -> str:
    return f"{name:<14}{count:>6}" + "".join(f"{_percent(a) + ' (' + _percent(b) + ')':>20}" for a, b in cells)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
