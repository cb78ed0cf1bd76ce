"""The connection of a job to Ray. Called by every job that needs a cluster."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import ray
from ray.data import DataContext
from transformers.utils.logging import disable_progress_bar

from minivlm import priority
from minivlm.config import Config, ConfigError
from minivlm.log import get_logger, quiet_libraries

LOCAL_ENVIRONMENT = {
    "RAY_worker_maximum_startup_concurrency": "8",  # one per core is Ray's, which warns when more processes wait
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process per run that watches for spot nodes being taken away
    "RAY_worker_niceness": "0",  # Ray's 15 puts a trainer behind the dashboard
    # How often Ray describes itself, on the dashboard and for Prometheus; as Ray sets it that takes another 1 to
    # 2 % of a core, which a trainer here wants.
    "METRICS_RECORD_INTERVAL_S": "60",
    "REPORTER_UPDATE_INTERVAL_MS": "15000",
    "RAY_metrics_report_interval_ms": "60000",
    "RAY_event_stats": "0",
}
"""Of clusters that we start on this machine; what is set already stays."""

TIMER_SLACK_NS = 20_000_000
PR_SET_TIMERSLACK = 29
"""From linux/prctl.h; see prctl(2)."""

NEVER_IDLE = ("raylet", "gcs_server")
"""Processes of Ray without which no other can work."""

EXIT_TIMEOUT_S = 5.0
log = get_logger(__name__)
_not_ours: list[psutil.Process] = []
"""Children of this process from before the cluster."""


def connect(config: Config, *, trainers_first: bool = False) -> None:
    """Attach to the cluster of `cluster.address` or of the surrounding Ray job, else start a local one.

    Args:
        trainers_first: on a local cluster all that Ray starts but training workers, raylet and GCS stands back, and
            training workers come first where they may (`minivlm.priority`); for jobs whose work is training.

    Raises:
        ConfigError: nothing answers at the address.
    """
    _not_ours.extend(psutil.Process().children(recursive=True))
    quiet_libraries()
    DataContext.get_current().enable_progress_bars = False  # minivlm.log.Progress shows what matters
    disable_progress_bar()
    settings = config.cluster
    address = settings.address or os.environ.get("RAY_ADDRESS")
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if not address:
        environment |= {name: os.environ.get(name, value) for name, value in LOCAL_ENVIRONMENT.items()}
    os.environ.update(environment)  # the driver is ours: Ray reads these when it starts
    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": environment},
    }
    if address:
        try:
            ray.init(address=address, **common)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(f"No Ray cluster answers at {address} ({error}). Start one: ray start --head") from None
        return
    if trainers_first:
        ray.cloudpickle.register_pickle_by_value(priority)
        common["runtime_env"]["worker_process_setup_hook"] = priority.take_place
    with late_timers():
        ray.init(
            num_cpus=settings.num_cpus,
            object_store_memory=settings.object_store_bytes,
            dashboard_host="127.0.0.1",
            dashboard_port=settings.dashboard_port,
            **common,
        )
    if trainers_first:
        _let_stand_back(_started())


@contextmanager
def late_timers() -> Iterator[None]:
    """Processes that this thread starts, and theirs, may be woken by a timer some milliseconds late, several at once.

    Ray's two dozen processes look 100 times a second each whether there is something to do. Beside a trainer that needs
    all cores that costs less where several look at once: 2 to 3 % (docs/RESULTS.md). Messages wake them as before.
    Linux only.
    """
    if sys.platform != "linux":
        yield
        return
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(TIMER_SLACK_NS))
    try:
        yield
    finally:
        prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(0))  # back to this thread's own


def is_connected() -> bool:
    """Whether this process is attached to a cluster."""
    return bool(ray.is_initialized())


def disconnect() -> None:
    """Leave the cluster; of one that was started here, also end the processes that outlive it.

    A controller of Ray Train 2.60 sometimes hangs in its own exit, where Ray no longer looks for it.
    """
    if is_connected():
        started = _started()
        ray.shutdown()
        end_processes(started, EXIT_TIMEOUT_S)


def _started() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child not in _not_ours]


def _let_stand_back(processes: list[psutil.Process]) -> None:
    try:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                if process.name() not in NEVER_IDLE:
                    priority.make_idle(process.pid)
    except OSError as error:
        log.warning("no process can stand back for training workers here, they share the cores: %s", error)


def end_processes(processes: list[psutil.Process], timeout_s: float) -> int:
    """Wait for processes to end, then kill the others; returns how many those were."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return len(alive)
