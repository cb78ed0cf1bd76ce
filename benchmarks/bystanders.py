"""What Ray's other processes cost a training worker: the same run with them at work and stopped, in turn.

    python -m benchmarks.bystanders                        # as jobs run them: they stand back
    python -m benchmarks.bystanders --nobody-stands-back

One worker with two threads as in `benchmarks.train_ray`. Every `--hold` seconds all processes of the local cluster but
the worker are stopped (SIGSTOP) or go on, so that both states see the same machine, whose speed may change by tenths
within minutes. Further options are those of `benchmarks.train_ray`, by default for short steps. Linux only.
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks import train_ray
from benchmarks.measure_command import command_line
from benchmarks.workload import write_features, write_table
from minivlm.train.metrics import METRICS_FILE, read_metrics

PAUSE_S = 0.7
"""After a stop, until what has queued up is done."""


class StopOthers:
    """While in use: milliseconds per 100 tokens of each step, by whether the worker's neighbours are stopped."""

    def __init__(self, metrics: Path, hold_s: float) -> None:
        self.times: dict[bool, list[float]] = {False: [], True: []}
        self._metrics, self._hold_s = metrics, hold_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "StopOthers":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while len(self._lines()) < train_ray.WARMUP and not self._stop.wait(0.5):
            pass
        is_stopped = False
        while not self._stop.wait(PAUSE_S):
            processes = _others() if is_stopped else []
            try:
                _send(processes, signal.SIGSTOP)
                first = len(self._lines()) + 1  # the step that has begun belongs to neither
                self._stop.wait(self._hold_s)
                lines = self._lines()
            finally:
                _send(processes, signal.SIGCONT)
            self.times[is_stopped] += [1e5 / line["tokens_per_s"] for line in lines[first:]]
            is_stopped = not is_stopped

    def _lines(self) -> list[dict[str, float]]:
        return read_metrics(self._metrics)


def _others() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if "RayTrainWorker" not in command_line(process)
    ]


def _send(processes: list[psutil.Process], what: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(what)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nobody-stands-back", action="store_true", help="as jobs ran before")
    parser.add_argument("--hold", type=float, default=4.0, help="seconds in each state")
    arguments, rest = parser.parse_known_args()
    if arguments.nobody_stands_back:
        os.environ["RAY_worker_niceness"] = "15"  # noqa: SIM112 -- Ray's own
    options = train_ray.parse(["--batch=2", "--steps=400", *rest])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = write_table(folder / "table", options.samples, seed=0)
        features = write_features(folder / "features", options.samples, seed=0)
        job = train_ray.make_job(folder, table, features, options)
        with StopOthers(job.run_dir / METRICS_FILE, arguments.hold) as measured:
            train_ray.measure_ray(job, table, trainers_first=not arguments.nobody_stands_back)
    if not all(measured.times.values()):
        sys.exit("the run was too short to see both states: type more --steps")
    at_work, stopped = (statistics.mean(measured.times[state]) for state in (False, True))
    counts = " and ".join(str(len(measured.times[state])) for state in (False, True))
    print(f"ms per 100 tokens, means of {counts} steps: others at work {at_work:.1f}, stopped {stopped:.1f}")
    print(f"the others cost {at_work / stopped - 1:.1%}")


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("processes are stopped and their policies set as on Linux: run it there")
    main()
