"""The processes that other tests fork: what they return, and that none outlives a failure."""

import time

import pytest
import torch.distributed as dist

from tests.forks import Forked, join


def succeed() -> None:
    assert not dist.is_initialized()  # whatever the tests before this one have made


def fail() -> None:
    raise ValueError("on purpose")


@pytest.mark.usefixtures("process_group")
def test_a_process_starts_without_the_group_of_the_tests():
    assert dist.is_initialized()
    assert join([Forked(succeed)], timeout_s=30) == [0]


def test_one_that_fails_takes_the_others_with_it():
    assert join([Forked(time.sleep, 60), Forked(fail)], timeout_s=30) == [-9, 1]


def test_one_that_never_ends_is_killed():
    assert join([Forked(time.sleep, 60)], timeout_s=0.05) == [-9]
