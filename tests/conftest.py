"""Shared by all tests: no token prompts from Ray, no network, a small home of its own."""

import gc
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import forks

os.environ["RAY_AUTH_MODE"] = "disabled"  # before anything imports ray; tests bind to loopback only
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 -- at Ray's 15 the workers starve beside anything else that runs
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported and looks for others
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny operations gain nothing from threads that wait in a loop

gc.disable()  # until all is imported (`template`): a fifth of the time of imports

settings.register_profile("untimed", deadline=None)  # a slow machine is no failure
settings.load_profile("untimed")

REPOSITORY = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--user-data", default=None, help="Folder with photos_*.json(l) and photos/: the main job on it.")


@pytest.fixture(scope="session", autouse=True)
def template() -> Iterator[None]:
    """The template of tests/forks.py, before any other fixture makes a thread, a process group or a cluster.

    The million objects that imports leave behind are taken out of garbage collection: it costs half a second each
    time with them, and DeepSpeed asks for six per engine.
    """
    gc.freeze()
    gc.enable()
    forks.start()
    yield
    forks.stop()


@pytest.fixture
def tiny_config() -> Path:
    """The embedded default's settings file."""
    return REPOSITORY / "configs" / "tiny.yaml"


@pytest.fixture(scope="session")
def user_data(request: pytest.FixtureRequest) -> Path:
    """A folder of real pictures given on the command line."""
    folder = request.config.getoption("--user-data")
    if folder is None:
        pytest.skip("no --user-data DIR given: the run on real photos needs a folder of them")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], list[int]]:
    """Ports of the loopback interface that nobody listens on just now."""

    def find(count: int) -> list[int]:
        sockets = [socket.socket() for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        ports = [int(item.getsockname()[1]) for item in sockets]
        for item in sockets:
            item.close()
        return ports

    return find


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """A gloo group of this process alone; DeepSpeed keeps the first that it sees, so there is one for all tests."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_rank(process_group: None) -> Iterator[None]:
    """The group, and the environment in which DeepSpeed finds its place in it."""
    patch = pytest.MonkeyPatch()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        patch.setenv(name, value)
    yield
    patch.undo()
