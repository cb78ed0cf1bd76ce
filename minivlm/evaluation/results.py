"""The files of an evaluation: samples.jsonl (one line per question) and results.json (the figures), in a folder.

results.json is written last, so that it exists only when all is complete.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minivlm.evaluation.summary import ScoredRow, to_json
from minivlm.storage import write_bytes, write_json


def is_evaluated(folder: Path) -> bool:
    """True when the folder holds a complete evaluation."""
    return (folder / "results.json").exists()


def write_results(folder: Path, rows: Sequence[ScoredRow], results: dict[str, Any]) -> None:
    """Write both files."""
    lines = "".join(json.dumps(to_json(row), ensure_ascii=False) + "\n" for row in rows)
    write_bytes(folder / "samples.jsonl", lines.encode())
    write_json(folder / "results.json", results)


def read_results(folder: Path) -> dict[str, Any]:
    """The figures of a checkpoint.

    Raises:
        FileNotFoundError: the folder holds no complete evaluation.
    """
    results: dict[str, Any] = json.loads((_require(folder) / "results.json").read_text(encoding="utf-8"))
    return results


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The scored questions of a checkpoint, as the fields of ScoredRow.

    Raises:
        FileNotFoundError: the folder holds no complete evaluation.
    """
    text = (_require(folder) / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def _require(folder: Path) -> Path:
    if not is_evaluated(folder):
        raise FileNotFoundError(f"No complete evaluation under {folder}. Run: python -m jobs.evaluate")
    return folder
