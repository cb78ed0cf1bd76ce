"""One self-contained HTML page about the checkpoints of a run: figures, curves, and answers beside their pictures.

`write_report(config, folders, path)` after `evaluate`. Pictures are data URIs, styles and the filter are inline, so the
file opens anywhere without a network. Whatever models or data wrote is escaped by the template engine, and a content
policy in the page forbids every outside address.
"""

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from minivlm.config import Config, ConfigError
from minivlm.data.images import BadImage, ImageLimits, read_image
from minivlm.data.settings import image_limits
from minivlm.evaluation.board import leader_board, metric_rows, task_rows, variant_names
from minivlm.evaluation.curves import HEIGHT, WIDTH, Chart, stage_charts
from minivlm.evaluation.results import read_attention, read_results, read_rows
from minivlm.evaluation.slices import find_slices
from minivlm.storage import write_bytes

_THUMBNAIL_PX = 224
_FAILURE_SHARE = 2 / 3
"""Most of the shown samples of a task that are failures, where there are right ones to show as well."""


def write_report(config: Config, folders: Sequence[Path], path: Path) -> Path:
    """Write the page.

    Args:
        folders: of evaluations of the same questions, in the order shown. The first one is what the others are compared
            with; the last one decides which samples are failures and orders the slices.
        path: the HTML file.

    Raises:
        FileNotFoundError: a folder without a complete evaluation.
        ConfigError: no folder, or checkpoints that answered different questions.
    """
    if not folders:
        raise ConfigError("A report needs at least one evaluated checkpoint. Run: python -m jobs.evaluate")
    results = [read_results(folder) for folder in folders]
    names = [result["name"] for result in results]
    if len({result["questions"] for result in results}) > 1:
        raise ConfigError(
            f"{', '.join(names)} were evaluated on different questions and cannot stand side by side. "
            "Delete their folders under evaluations/ and run: python -m jobs.evaluate"
        )
    rows = [read_rows(folder) for folder in folders]
    limits = image_limits(config)
    chosen = choose_samples(rows[-1], config.evaluation.report_samples_per_task)
    tasks = task_rows(results)
    page = _template().render(
        names=names,
        board=leader_board(results, rows),
        variants=variant_names(results),
        tasks=tasks,
        metrics=metric_rows(tasks),
        languages=sorted({row["language"] for row in rows[-1]}),
        charts=[chart for result in results for chart in _charts(result)],
        chart_size=(WIDTH, HEIGHT),
        slices=find_slices(rows),
        looked=_looked([read_attention(folder) for folder in folders], rows, limits),
        samples=[_sample(index, rows, limits) for index in chosen],
        num_questions=results[-1]["num_questions"],
        benchmarks=sorted({row["task"] for row in rows[-1] if row["source"]}),
    )
    write_bytes(path, page.encode())
    return path


def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("report.html.jinja")


def _charts(result: dict[str, Any]) -> list[Chart]:
    """Curves of the run that wrote a stage's checkpoint RUN/checkpoints/NAME; a folder from elsewhere has none."""
    if result["stage"] is None:
        return []
    return stage_charts(result["name"], Path(result["checkpoint"]).parents[1] / "metrics.jsonl")


def _looked(
    maps: Sequence[dict[int, dict[str, Any]]], rows: Sequence[Sequence[dict[str, Any]]], limits: ImageLimits
) -> list[dict[str, Any]]:
    """Questions whose attention is shown, each with what every checkpoint looked at (None: not computed)."""
    return [
        _sample(number, rows, limits) | {"maps": [own.get(number) for own in maps]}
        for number in sorted({number for own in maps for number in own})
    ]


def choose_samples(rows: Sequence[dict[str, Any]], per_task: int) -> list[int]:
    """Positions of the rows to show: for each task failures first (worst first), then right ones, evenly spread."""
    by_task: defaultdict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_task[row["task"]].append(index)
    failures: list[int] = []
    successes: list[int] = []
    for task in sorted(by_task):
        wrong = [i for i in by_task[task] if rows[i]["score"] < 1]
        right = [i for i in by_task[task] if rows[i]["score"] >= 1]
        most = max(int(per_task * _FAILURE_SHARE), per_task - len(right))
        failures += _evenly(wrong, min(most, per_task))
        successes += _evenly(right, per_task - min(len(wrong), most))
    return sorted(failures, key=lambda i: rows[i]["score"]) + successes


def thumbnail_uri(path: str, limits: ImageLimits) -> str | None:
    """The picture as a data URI, at most 224 px wide or high; None if it is gone or cannot be read."""
    try:
        picture, _ = read_image(Path(path), limits)
    except BadImage:
        return None
    is_small = max(picture.size) <= _THUMBNAIL_PX
    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind = "png" if is_small else "jpeg"
    picture.save(buffer, kind, quality=82)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _sample(index: int, rows: Sequence[Sequence[dict[str, Any]]], limits: ImageLimits) -> dict[str, Any]:
    last = rows[-1][index]
    return {
        "task": last["task"],
        "language": last["language"],
        "question": last["question"].replace("<image>", "").strip(),
        "truth": last["truth"],
        "pictures": [thumbnail_uri(path, limits) for path in last["images"]],
        "answers": [
            {"text": row["answer"], "score": row["score"], "variants": row["variants"], "cut": row["cut"]}
            for row in (stage_rows[index] for stage_rows in rows)
        ],
        "failed": last["score"] < 1,
    }


def _evenly(items: Sequence[int], count: int) -> list[int]:
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
