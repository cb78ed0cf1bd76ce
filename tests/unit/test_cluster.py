"""Leaving a cluster."""

import subprocess
import sys

import psutil

from minivlm.workflow.cluster import end_processes


def test_what_does_not_end_by_itself_is_killed():
    stays = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    ends = subprocess.Popen([sys.executable, "-c", "pass"])
    assert end_processes([psutil.Process(process.pid) for process in (stays, ends)], timeout_s=3.0) == 1
    assert stays.wait(10) == -9
    assert ends.wait(10) == 0
