"""Training curves as points of small SVG charts, from the runs' metrics.jsonl. Pure functions."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WIDTH, HEIGHT = 320.0, 130.0
"""Plot area in SVG units."""

_MAX_POINTS = 200
Series = list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """One metric over the steps of one stage. `line` and `dots` are in SVG units, `low`/`high`/`last_step` label axes.

    `line` is an SVG path; `dots` are validation points.
    """

    title: str
    line: str
    dots: list[tuple[float, float]]
    low: str
    high: str
    last_step: int
    last_value: str


def read_metrics(path: Path) -> dict[str, Series]:
    """Finite (step, value) pairs by metric name. A missing file or a torn last line is no error: it has no points."""
    series: dict[str, Series] = {}
    if not path.exists():
        return series
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            step = float(row["step"])
        except (ValueError, KeyError, TypeError):
            continue
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(name, []).append((step, float(value)))
    return series


def make_chart(title: str, line: Series, dots: Series) -> Chart:
    """Scale a smoothed training curve and validation dots into the plot area.

    Raises:
        ValueError: the training curve has no points.
    """
    if not line:
        raise ValueError(f"chart `{title}` has no points")
    smooth = _thin(_smooth(line))
    values = [value for _, value in smooth + dots]
    low, high = min(values), max(values)
    first, last = line[0][0], max(step for step, _ in line + dots)

    def place(step: float, value: float) -> tuple[float, float]:
        x = WIDTH * (step - first) / max(last - first, 1.0)
        y = HEIGHT * (1 - (value - low) / ((high - low) or 1.0))
        return round(x, 1), round(y, 1)

    points = [place(*point) for point in smooth]
    path = "M" + " L".join(f"{x} {y}" for x, y in points)
    final = (dots or smooth)[-1][1]
    return Chart(title, path, [place(*dot) for dot in dots], f"{low:.3g}", f"{high:.3g}", int(last), f"{final:.3g}")


def stage_charts(stage: str, metrics_path: Path) -> list[Chart]:
    """Loss of a stage, and for preference training how often the chosen answer is ahead, and by how much."""
    metrics = read_metrics(metrics_path)
    charts = []
    for name, label in (
        ("train/loss", "loss"),
        ("rewards/accuracies", "chosen ahead of rejected"),
        ("rewards/margins", "reward margin"),
    ):
        if metrics.get(name):
            dots = metrics.get("val/loss", []) if name == "train/loss" else []
            charts.append(make_chart(f"{stage}: {label}", metrics[name], dots))
    return charts


def _smooth(series: Series, share: float = 0.03) -> Series:
    """Mean over a trailing window of a small share of the run."""
    window = max(1, int(len(series) * share))
    smooth = []
    for i, (step, _) in enumerate(series):
        recent = [value for _, value in series[max(0, i - window + 1) : i + 1]]
        smooth.append((step, sum(recent) / len(recent)))
    return smooth


def _thin(series: Sequence[tuple[float, float]]) -> Series:
    stride = -(-len(series) // _MAX_POINTS)
    return [*series[:-1:stride], series[-1]]
