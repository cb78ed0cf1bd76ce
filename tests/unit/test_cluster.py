"""Starting and leaving a cluster."""

import subprocess
import sys

import psutil
import pytest

from minivlm.workflow.cluster import TIMER_SLACK_NS, end_processes, late_timers


def test_what_does_not_end_by_itself_is_killed():
    stays = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    ends = subprocess.Popen([sys.executable, "-c", "pass"])
    assert end_processes([psutil.Process(process.pid) for process in (stays, ends)], timeout_s=3.0) == 1
    assert stays.wait(10) == -9
    assert ends.wait(10) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_what_is_started_inside_may_be_woken_late_and_nothing_else():
    def slack_of_a_child() -> int:
        child = "import subprocess; print(subprocess.check_output(['cat', '/proc/self/timerslack_ns'], text=True))"
        return int(subprocess.check_output([sys.executable, "-c", child], text=True))

    before = slack_of_a_child()
    with late_timers():
        assert slack_of_a_child() == TIMER_SLACK_NS != before
    assert slack_of_a_child() == before
