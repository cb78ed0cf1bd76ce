"""Run a command and print its wall time and the peak memory of it and all its descendants together.

    python -m benchmarks.measure_command make demo

Memory is the sum of proportional set sizes (PSS: a page shared by n processes counts 1/n for each), so Ray's object
store and shared libraries count once. It is read from /proc every five seconds: a reading costs half a second of a
core. Linux only.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

INTERVAL_S = 5.0


def command_line(process: psutil.Process) -> str:
    """Arguments of one process (Ray's workers rename themselves there); empty once it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def pss_bytes(process: psutil.Process) -> int:
    """Proportional set size of one process; 0 once it has ended."""
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
        return 0


def peak_resident_bytes(process: psutil.Process) -> int:
    """Most memory that one process has had so far, shared pages in full; 0 once it has ended. Costs next to nothing."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(lines[0][1]) if lines else 0


class PeakMemory:
    """Peak memory of this process's descendants whose command line contains `name` ("" = all of them), while in use."""

    def __init__(
        self, name: str = "", *, interval_s: float = INTERVAL_S, of: Callable[[psutil.Process], int] = pss_bytes
    ) -> None:
        """
        Args:
            of: memory of one process; those of all are added up.
        """
        self.peak_bytes, self.num_processes = 0, 0
        self._name, self._interval_s, self._of = name, interval_s, of
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            family = [child for child in psutil.Process().children(recursive=True) if self._name in command_line(child)]
            total = sum(self._of(process) for process in family)
            if total > self.peak_bytes:
                self.peak_bytes, self.num_processes = total, len(family)


def main(command: list[str]) -> int:
    """Run `command`, report, and return its exit code."""
    started = time.monotonic()
    with PeakMemory() as memory:
        code = subprocess.call(command)
    seconds, peak = time.monotonic() - started, memory.peak_bytes / 2**30
    print(
        f"wall {seconds:.1f} s, peak memory {peak:.2f} GiB PSS over {memory.num_processes} processes, exit code {code}"
    )
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
