"""Environment of a process that trains: threads, the kind of device, and where a CPU's memory comes from."""

import os
from pathlib import Path

import ray

from minivlm.config import Config
from minivlm.priority import TRAINS

KEEP_FREED_MEMORY = {
    "MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
"""Of jemalloc and glibc, which else give a step's freed tensors back to the kernel, which clears their pages anew."""

JEMALLOC = Path(ray.__file__).parent / "core" / "libjemalloc.so"
"""Comes with Ray for its own processes. It finds memory faster than glibc, 5 % of a step (docs/RESULTS.md)."""


def worker_environment(config: Config) -> dict[str, str]:
    """Environment of a training worker; set before it imports anything."""
    threads = str(config.train.threads_per_worker)
    environment = {TRAINS: "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": threads}
    if config.train.use_gpu:
        return environment
    return {**environment, "DS_ACCELERATOR": "cpu", **KEEP_FREED_MEMORY, **_preloaded()}


def _preloaded() -> dict[str, str]:
    """Nothing where the user preloads something, or where the dynamic linker or Ray would read the path otherwise."""
    is_usable = JEMALLOC.is_file() and not set(" :;$") & set(str(JEMALLOC)) and "LD_PRELOAD" not in os.environ
    return {"LD_PRELOAD": str(JEMALLOC)} if is_usable else {}
