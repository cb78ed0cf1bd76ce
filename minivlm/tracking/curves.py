"""Curves of a training run: tail its metrics.jsonl from a thread and log each (metric, step) once.

Training appends one JSON object per optimizer step and, when it restarts from a checkpoint, drops the lines after it
and writes them again. So the reader starts over when the file shrinks or is replaced, and remembers what is logged.
"""

import json
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from minivlm.log import get_logger
from minivlm.tracking.client import one_line

MAX_METRICS_PER_CALL = 1000

log = get_logger(__name__)


class CurveFollower:
    """Logs `path`'s numbers to one run every `interval_s` seconds between `start` and `stop`.

    Args:
        client: MLflow client; used from this thread beside its owner's.
        run_id: the run that the curves belong to; points that it has already are not logged again.
        path: JSON lines with an integer `step`; other numbers are metrics, everything else is left out.
    """

    def __init__(self, client: MlflowClient, run_id: str, path: Path, *, interval_s: float) -> None:
        self._client = client
        self._run_id = run_id
        self._path = path
        self._interval_s = interval_s
        self._inode = self._offset = 0
        self._logged: dict[str, set[int]] = {}
        self._waiting: list[Metric] = []
        self._stop = threading.Event()
        self._has_warned = False
        self._thread = threading.Thread(target=self._loop, name="mlflow-curves", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def stop(self) -> None:
        """Read the whole file once more, log what is missing, and end."""
        self._stop.set()
        self._thread.join()
        self._offset = 0  # points that a rewrite hid between two reads are found now
        self._read_and_log()
        if self._waiting:
            log.warning(
                "%d points of %s did not reach MLflow. Run the same command again to log them.",
                len(self._waiting), self._path,
            )  # fmt: skip

    def _loop(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._read_and_log()

    def _read_and_log(self) -> None:
        try:
            for row in self._new_rows():
                self._collect(row)
            while self._waiting:
                self._client.log_batch(self._run_id, metrics=self._waiting[:MAX_METRICS_PER_CALL])
                del self._waiting[:MAX_METRICS_PER_CALL]
        except MlflowException as error:
            self._offset = 0
            if not self._has_warned:
                self._has_warned = True
                log.warning("MLflow does not take metrics (%s); they wait in %s", one_line(error), self._path)

    def _new_rows(self) -> list[dict[str, Any]]:
        """Complete lines after the last one read; from the top if the file was replaced or cut."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(0, 2)
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode or file.tell() < self._offset:
                self._inode, self._offset = inode, 0
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [row for line in complete.splitlines() if (row := _parse(line))]

    def _collect(self, row: dict[str, Any]) -> None:
        now = int(time.time() * 1000)
        step = int(row["step"])
        for key, value in row.items():
            if key == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if key not in self._logged:
                self._logged[key] = {point.step for point in self._client.get_metric_history(self._run_id, key)}
            if step not in self._logged[key] and not math.isnan(value):
                self._logged[key].add(step)
                self._waiting.append(Metric(key, float(value), now, step))


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line that a rewrite cut is no JSON; the next read from the top finds its whole form."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None
