"""Run a command and print its wall time and the peak memory of it and all its descendants together.

    python -m benchmarks.measure_command make demo

Memory is the sum of proportional set sizes (PSS: a page shared by n processes counts 1/n for each), so Ray's object
store and shared libraries count once. It is read from /proc every five seconds: a reading costs half a second of a
core. Linux only.
"""

import subprocess
import sys
import time

import psutil

INTERVAL_S = 5.0


def pss_bytes(process: psutil.Process) -> int:
    """Proportional set size of one process; 0 once it has ended."""
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
        return 0


def main(command: list[str]) -> int:
    """Run `command`, report, and return its exit code."""
    started = time.monotonic()
    child = subprocess.Popen(command)
    root = psutil.Process(child.pid)
    peak, peak_count = 0, 0
    while child.poll() is None:
        try:
            family = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        total = sum(pss_bytes(process) for process in family)
        if total > peak:
            peak, peak_count = total, len(family)
        time.sleep(INTERVAL_S)
    code = child.wait()
    seconds = time.monotonic() - started
    print(f"wall {seconds:.1f} s, peak memory {peak / 2**30:.2f} GiB PSS over {peak_count} processes, exit code {code}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
