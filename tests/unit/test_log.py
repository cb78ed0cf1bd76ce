"""Logging and progress lines."""

import logging
import os

import pytest

from minivlm.log import Progress, get_logger, quiet_libraries


def test_loggers_write_one_line_with_name_and_level_to_stderr(capsys):
    get_logger("minivlm.data.plan").warning("two rows")
    get_logger("minivlm.data.plan").debug("hidden")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip().endswith("WARNING minivlm.data.plan: two rows")
    assert captured.err.count("\n") == 1


def test_progress_without_a_terminal_prints_plain_lines_with_rate_and_values(capsys):
    with Progress(4, "encode", interval_s=0) as progress:
        progress.update(2, loss=0.5)
        progress.update(2)
    first, last = capsys.readouterr().err.splitlines()
    assert "encode 2/4" in first
    assert "loss 0.5" in first
    assert "left" in first
    assert "encode 4/4" in last
    assert "left" not in last


def test_progress_lines_are_rare(capsys):
    with Progress(1000, "steps", interval_s=60) as progress:
        for _ in range(1000):
            progress.update()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_progress_says_how_far_it_came_when_interrupted(capsys):
    with pytest.raises(RuntimeError), Progress(10, "steps") as progress:  # noqa: PT012
        progress.update(3)
        raise RuntimeError
    assert "steps 3/10" in capsys.readouterr().err


def test_quiet_libraries_keeps_errors_and_what_the_user_set(monkeypatch, capsys):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    monkeypatch.delenv("RAY_DATA_DISABLE_PROGRESS_BARS", raising=False)
    quiet_libraries()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"
    assert os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] == "1"
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.setLevel(logging.INFO)  # what importing DeepSpeed does
    deepspeed.addHandler(logging.StreamHandler())
    deepspeed.info("chatter")
    deepspeed.error("trouble")
    assert capsys.readouterr().err == "trouble\n"
