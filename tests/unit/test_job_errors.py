"""How a job's command line ends when something is wrong."""

import sys
from pathlib import Path

import pytest

from jobs.common import run_job


def write_to_a_full_disk() -> None:
    with Path("/dev/full").open("w") as file:
        file.write("x" * 100_000)


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["job"])
    with pytest.raises(SystemExit) as ended:
        run_job(write_to_a_full_disk)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
