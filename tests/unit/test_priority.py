"""Processes that stand back for those that train."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minivlm.config import load_config
from minivlm.priority import FIRST, TRAINS, make_idle, take_place
from minivlm.train import environment as worker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="SCHED_IDLE")

NICENESS = """
import os, sys
from minivlm import priority

priority.AUTOGROUP = sys.argv[1]
priority.take_place()
print(os.getpriority(os.PRIO_PROCESS, 0))
"""

POLICIES = """
import os, threading
from minivlm.priority import take_place

def policy_of_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(os.sched_getscheduler(threading.get_native_id())))
    thread.start()
    thread.join()
    return found[0]

end = threading.Event()
older = threading.Thread(target=end.wait)
older.start()
take_place()
print(os.sched_getscheduler(os.getpid()), os.sched_getscheduler(older.native_id), policy_of_a_new_thread())
end.set()
"""


def policies(environment: dict[str, str]) -> list[int]:
    """Of the main thread, an older and a newer thread of a process that was asked to stand back."""
    environment = {**os.environ, **environment}
    return [int(word) for word in subprocess.check_output([sys.executable, "-c", POLICIES], env=environment).split()]


def test_all_threads_of_a_process_stand_back():
    assert policies({}) == [os.SCHED_IDLE] * 3


def test_a_process_that_trains_does_not_stand_back():
    assert policies({TRAINS: "1"}) == [os.SCHED_OTHER] * 3


def niceness(switch: Path, *prefix: str) -> int:
    """Of a process that trains."""
    command = [*prefix, sys.executable, "-c", NICENESS, str(switch)]
    return int(subprocess.check_output(command, env={**os.environ, TRAINS: "1"}))


def test_what_trains_comes_first_where_that_is_allowed_and_costs_others_nothing(tmp_path: Path):
    code = f"import os; os.setpriority(os.PRIO_PROCESS, 0, {FIRST})"
    is_allowed = subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    switch, usual = tmp_path / "switch", os.getpriority(os.PRIO_PROCESS, 0)
    assert niceness(switch) == usual  # no such switch
    switch.write_text("0\n")
    assert niceness(switch) == usual
    switch.write_text("1\n")
    assert niceness(switch) == (FIRST if is_allowed and usual == 0 else usual)
    assert niceness(switch, "nice", "-n", "3") == usual + 3  # somebody's choice


def test_where_it_is_forbidden_processes_go_on_as_they_are(monkeypatch: pytest.MonkeyPatch):
    def forbid(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", forbid)
    with pytest.raises(PermissionError):
        make_idle(os.getpid())
    take_place()


def test_training_workers_are_started_as_such(tiny_config: Path):
    assert TRAINS in worker.worker_environment(load_config(tiny_config))


@pytest.mark.parametrize(
    ("folder", "own", "is_preloaded"), [("ray", None, True), ("my ray", None, False), ("ray", "other.so", False)]
)
def test_training_workers_take_rays_allocator(
    folder: str, own: str | None, is_preloaded: bool, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / folder / "libjemalloc.so"
    path.parent.mkdir()
    path.touch()
    monkeypatch.setattr(worker, "JEMALLOC", path)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    if own:
        monkeypatch.setenv("LD_PRELOAD", own)
    found = worker.worker_environment(load_config(tiny_config)).get("LD_PRELOAD")
    assert found == (str(path) if is_preloaded else None)


def test_a_process_that_ended_is_no_error():
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    make_idle(ended.pid)
