"""The curve of a run: one JSON line per optimizer step, written by rank 0 and read while it grows.

    {"step": 1, "train/loss": 6.1, "lr": 1e-4, "grad_norm": 0.8, "tokens_per_s": 5000.0, ...}

`step` counts finished steps from 1. After a restart the lines behind the checkpoint are dropped and written again.
"""

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from minivlm.log import Progress
from minivlm.storage import write_bytes

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
SHOWN = {"train/loss": "loss", "val/loss": "val_loss", "rewards/accuracies": "accuracy", "tokens_per_s": "tokens_per_s"}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Complete lines of a metrics (or samples) file; a torn last line is left out, a missing file is empty."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class MetricsWriter:
    """Appends lines, flushed one by one.

    Args:
        path: the file; lines with `step` above `after_step` (written by a run that died) are dropped first.
    """

    def __init__(self, path: Path, *, after_step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= after_step]
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file: TextIO = path.open("a")

    def write(self, values: Mapping[str, float | str]) -> None:
        """Append one line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ProgressFollower:
    """Context manager in the driver: shows the run's progress while workers write its metrics file."""

    def __init__(self, path: Path, *, first_step: int, total_steps: int, label: str, interval_s: float = 1.0) -> None:
        self._path, self._interval_s = path, interval_s
        self._seen, self._total, self._label = first_step, total_steps, label
        self._inode = self._offset = 0
        if path.exists():  # of a run that died: the worker that continues writes a new file
            self._inode, self._offset = path.stat().st_ino, path.stat().st_size
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="train-progress", daemon=True)

    def __enter__(self) -> "ProgressFollower":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        with Progress(self._total, self._label) as progress:
            progress.update(self._seen)
            is_over = False
            while not is_over:
                is_over = self._stop.wait(self._interval_s)
                self._read(progress)

    def _read(self, progress: Progress) -> None:
        """Count the new lines; a restarted worker writes a new file, which is read from its start."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset = status.st_ino, 0
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            values = json.loads(line)
            if values["step"] > self._seen:
                shown = {name: values[key] for key, name in SHOWN.items() if key in values}
                progress.update(int(values["step"]) - self._seen, **shown)
                self._seen = int(values["step"])
