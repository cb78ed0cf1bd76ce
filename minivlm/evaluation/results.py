"""The two files of an evaluation: samples.jsonl (one line per question) and results.json (the figures).

results.json is written last, so that it exists only when all is complete.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minivlm.config import Config, StageName
from minivlm.evaluation.summary import ScoredRow, to_json
from minivlm.layout import evaluation_dir
from minivlm.storage import write_bytes, write_json


def is_evaluated(config: Config, stage: StageName) -> bool:
    """True when the stage's evaluation is complete."""
    return (evaluation_dir(config, stage) / "results.json").exists()


def write_results(config: Config, stage: StageName, rows: Sequence[ScoredRow], results: dict[str, Any]) -> None:
    """Write both files."""
    folder = evaluation_dir(config, stage)
    lines = "".join(json.dumps(to_json(row), ensure_ascii=False) + "\n" for row in rows)
    write_bytes(folder / "samples.jsonl", lines.encode())
    write_json(folder / "results.json", results)


def read_results(config: Config, stage: StageName) -> dict[str, Any]:
    """The figures of a stage.

    Raises:
        FileNotFoundError: the stage was not evaluated.
    """
    results: dict[str, Any] = json.loads((_require(config, stage) / "results.json").read_text(encoding="utf-8"))
    return results


def read_rows(config: Config, stage: StageName) -> list[dict[str, Any]]:
    """The scored questions of a stage, as the fields of ScoredRow.

    Raises:
        FileNotFoundError: the stage was not evaluated.
    """
    text = (_require(config, stage) / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def _require(config: Config, stage: StageName) -> Path:
    folder = evaluation_dir(config, stage)
    if not is_evaluated(config, stage):
        raise FileNotFoundError(f"No evaluation of {stage} under {folder}. Run: python -m jobs.evaluate")
    return folder
