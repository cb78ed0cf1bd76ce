"""A job through `ray job submit` on a cluster started by `ray start --head`, seen in the dashboard's job list."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).parents[2]
START_TIMEOUT_S = 90
JOB_TIMEOUT_S = 240


@pytest.fixture
def dashboard(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], list[int]]) -> Iterator[str]:
    """Address of a head node of its own; it runs in the foreground of a process group that is ended afterwards."""
    ports = dict(zip(("gcs", "dashboard", "agent", "grpc", "metrics", "client"), free_ports(6), strict=True))
    address = f"http://127.0.0.1:{ports['dashboard']}"
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"),
        *("--node-ip-address=127.0.0.1", f"--port={ports['gcs']}", f"--ray-client-server-port={ports['client']}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={ports['dashboard']}"),
        *(f"--dashboard-agent-listen-port={ports['agent']}", f"--dashboard-agent-grpc-port={ports['grpc']}"),
        *(f"--metrics-export-port={ports['metrics']}", "--object-store-memory=200000000"),
        f"--temp-dir={tmp_path_factory.mktemp('ray')}",
    ]
    node = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait_for(address)
        yield address
    finally:
        node.terminate()  # it ends the others
        with suppress(subprocess.TimeoutExpired):
            node.wait(timeout=5)
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)  # after a job it waits for them in vain
        node.wait(timeout=20)


def _wait_for(address: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(f"{address}/api/jobs/", timeout=2).read()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def test_tokenizer_job_by_ray_job_submit(dashboard: str, tmp_path: Path):
    sizes = {"train_scenes": 40, "change_scenes": 10, "reasoning_scenes": 10, "prompt_scenes": 10}
    sizes |= {"val_questions_per_task": 2, "test_questions_per_task": 3, "test_reasoning_questions": 3}
    small = [f"miniworld.{name}={count}" for name, count in sizes.items()]
    result = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", dashboard),
            *("--submission-id", "tokenizer-test", "--working-dir", str(REPOSITORY), "--"),
            *(sys.executable, "-m", "jobs.tokenizer", "--config", "configs/tiny.yaml"),
            *(f"storage_path={tmp_path}", *small),
        ],
        capture_output=True,
        text=True,
        timeout=JOB_TIMEOUT_S,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    [tokenizer] = (tmp_path / "tokenizers").glob("*/tokenizer.json")
    assert f"tokenizer: {tokenizer.parent}" in result.stdout
    listed = json.loads(urllib.request.urlopen(f"{dashboard}/api/jobs/", timeout=10).read())
    assert [(job["submission_id"], job["status"]) for job in listed] == [("tokenizer-test", "SUCCEEDED")]
