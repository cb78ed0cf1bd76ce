"""Processes that have imported what the tests have, in milliseconds instead of ten seconds.

`start` forks a template of the test process before its first test: no thread, process group or engine is there yet.
The template forks itself for each `Forked`.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_context = multiprocessing.get_context("fork")
_template: list[tuple[BaseProcess, Connection]] = []


def start() -> None:
    """Make the template of this process as it is now."""
    assert not _template
    ours, theirs = _context.Pipe()
    process = _context.Process(target=_serve, args=(ours, theirs), daemon=True)
    process.start()
    theirs.close()
    _template.append((process, ours))


def stop() -> None:
    """End the template, and all that it forked."""
    process, connection = _template.pop()
    connection.close()
    process.join()


def _ask(*request: Any) -> Any:
    connection = _template[0][1]
    connection.send(request)
    return connection.recv()


class Forked:
    """`target(*arguments)` in a process of its own. Both are pickled, so the target is a function of a module."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self.pid: int = _ask("fork", target, arguments)
        self._exitcode: int | None = None

    @property
    def exitcode(self) -> int | None:
        """None while it runs; 0, 1 after an exception, or minus the signal that ended it."""
        if self._exitcode is None:
            self._exitcode = _ask("poll", self.pid)
        return self._exitcode

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        if self.exitcode is None:
            os.kill(self.pid, signal.SIGKILL)


def join(processes: Sequence[Forked], timeout_s: float) -> list[int]:
    """Their exit codes; one that fails, or the end of the time, takes the others with it."""
    deadline = time.monotonic() + timeout_s
    while None in (codes := [process.exitcode for process in processes]):
        if any(codes) or time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.02)
    return [code for code in codes if code is not None]


def _serve(ours: Connection, requests: Connection) -> None:
    """The template: forks what it is asked for, and reaps it, until the test process has gone."""
    ours.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the test process hears it, and closes the connection
    running: set[int] = set()
    while True:
        try:
            kind, *rest = requests.recv()
        except EOFError:
            break
        if kind == "fork":
            pid = os.fork()
            if pid == 0:
                requests.close()
                _run(*rest)
            running.add(pid)
            requests.send(pid)
        else:
            pid, status = os.waitpid(rest[0], os.WNOHANG)
            running.discard(pid)
            requests.send(os.waitstatus_to_exitcode(status) if pid else None)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _run(target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """The forked process; leaves without what the test process would do at its exit."""
    try:
        target(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
