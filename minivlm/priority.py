"""Which processes of a machine get its cores first: those that train, before all others of Ray.

Ray's two dozen processes look about a hundred times a second each whether there is something to do. That costs a
trainer on few cores more than its share of them, because the trainer's threads wait for each other in every operation.
As idle processes the others run when the trainer waits, and it waits when it needs them. `minivlm.workflow.cluster`
calls `make_idle` for what it starts, Ray calls `take_place` in every process that it starts for a job. The latter goes
there by value, before that process knows where to import from: this file imports nothing but the standard library.
"""

import os
import sys
from contextlib import suppress

TRAINS = "MINIVLM_TRAINS"
"""Environment variable of the processes that do not stand back."""

AUTOGROUP = "/proc/sys/kernel/sched_autogroup_enabled"
"""Reads 1 where niceness is only between processes of one session, or of one control group: see sched(7)."""

FIRST = -10
"""Niceness of what trains. Two dozen idle processes, of which each weighs 3, otherwise get some per cent of a core
beside the 1,024 of a thread; this weighs 9,548. At -20 dashboards answer after seconds (docs/RESULTS.md)."""


def take_place() -> None:
    """If this process trains put it first, else let it run only where nothing else wants the core.

    To be first needs privileges, and is tried only where nobody chose a niceness and no process outside this session or
    control group loses by it. Where the system forbids either a process stays as it is.
    """
    with suppress(OSError):  # `connect` has said so of idle processes
        if TRAINS not in os.environ:
            make_idle(os.getpid())
        elif os.getpriority(os.PRIO_PROCESS, 0) == 0 and _is_among_ourselves():
            os.setpriority(os.PRIO_PROCESS, 0, FIRST)


def _is_among_ourselves() -> bool:
    try:
        with open(AUTOGROUP) as file:
            return file.read().strip() == "1"
    except OSError:
        return False


def make_idle(process_id: int) -> None:
    """Give all threads of a process, and all that they start, Linux's policy SCHED_IDLE: see sched(7).

    A process without privileges cannot leave it again. On other systems nothing happens.

    Raises:
        OSError: the system knows no such policy or does not allow it (some sandboxes).
    """
    if sys.platform != "linux":
        return
    done: set[int] = set()
    while new := _threads(process_id) - done:  # also those that a thread started before its own turn
        for thread in new:
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        done |= new


def _threads(process_id: int) -> set[int]:
    try:
        return {int(name) for name in os.listdir(f"/proc/{process_id}/task")}
    except (FileNotFoundError, ProcessLookupError):
        return set()
