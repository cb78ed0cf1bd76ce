"""What this machine can do, measured: the limits that the other benchmarks print beside their figures.

    python -m benchmarks.machine [--device cuda]

Needs torch only.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

MATMUL_SIZE = 2048
SMALL_MATMUL_SIZE = 512
SLOW_SECONDS = 0.1
"""A small product that takes longer (bfloat16 on a CPU without units for it) stands for the large one."""

COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Limits:
    """Measured ceilings of one device."""

    matmul_gflops: dict[str, float]
    """By type ("float32", "bfloat16"): a product of two 2048 x 2048 matrices (512 where that is very slow), 10^9
    operations per second."""

    copy_gb_per_s: float
    """A copy of 256 MiB, read and written bytes, 10^9 per second."""


def measure_limits(device: torch.device, *, threads: int | None = None) -> Limits:
    """Measure; seconds on a CPU, where `threads` is set for the rest of the process."""
    if threads is not None:
        torch.set_num_threads(threads)
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    rates = {name: _matmul_gflops(dtype, device) for name, dtype in types.items()}
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device)
    return Limits(rates, 2 * COPY_BYTES / seconds / 1e9)


def _matmul_gflops(dtype: torch.dtype, device: torch.device) -> float:
    for size in (SMALL_MATMUL_SIZE, MATMUL_SIZE):
        matrix = torch.randn(size, size, device=device).to(dtype)
        seconds = median_seconds(partial(torch.matmul, matrix, matrix), device)
        if seconds > SLOW_SECONDS:
            break
    return 2 * size**3 / seconds / 1e9


def median_seconds(action: Callable[[], object], device: torch.device, *, repeats: int = 5) -> float:
    """Median time of `action` after one call that does not count; on CUDA each is waited for."""
    action()
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        action()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    """Wait for what the device has queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(limits: Limits, device: torch.device) -> str:
    """One line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    products = ", ".join(f"{kind} {rate:.3g}" for kind, rate in limits.matmul_gflops.items())
    return f"{name}: matrix products in GFLOP/s: {products}; copy {limits.copy_gb_per_s:.1f} GB/s"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    chosen = torch.device(arguments.device)
    print(describe(measure_limits(chosen, threads=arguments.threads), chosen))
