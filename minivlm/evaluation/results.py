"""The files of an evaluation, in a folder; results.json is written last, so that it exists only when all is complete.

samples.jsonl    one line per question     attention.json   where a few answers looked, as overlays
results.json     the figures               lmms_eval/       the same in lmms-eval's files (evaluation/harness.py)
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from minivlm.evaluation.harness import write_harness_files
from minivlm.evaluation.summary import ScoredRow, to_json
from minivlm.storage import write_bytes, write_json


def is_evaluated(folder: Path) -> bool:
    """True when the folder holds a complete evaluation."""
    return (folder / "results.json").exists()


def write_results(
    folder: Path,
    rows: Sequence[ScoredRow],
    results: dict[str, Any],
    *,
    attention: Mapping[int, Mapping[str, Any]],
) -> None:
    """Write all files.

    Args:
        attention: by the question's number, see `minivlm.evaluation.heatmap.describe`.
    """
    plain = [to_json(row) for row in rows]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in plain)
    write_bytes(folder / "samples.jsonl", lines.encode())
    if attention:
        write_json(folder / "attention.json", {str(number): own for number, own in attention.items()})
    write_harness_files(folder, plain, results, date=datetime.now(UTC))
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


def read_attention(folder: Path) -> dict[int, dict[str, Any]]:
    """Where answers looked, by the question's number; empty where none was asked for.

    Raises:
        FileNotFoundError: the folder holds no complete evaluation.
    """
    path = _require(folder) / "attention.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {int(number): own for number, own in found.items()}


def _require(folder: Path) -> Path:
    if not is_evaluated(folder):
        raise FileNotFoundError(f"No complete evaluation under {folder}. Run: python -m jobs.evaluate")
    return folder
