"""The cluster that a job starts on its own machine: everything but Ray's core stands back for training workers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minivlm.priority import TRAINS

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(sys.platform != "linux", reason="SCHED_IDLE")]

SCRIPT = """
import json, os, sys
from pathlib import Path

import psutil
import ray

from minivlm.config import load_config
from minivlm.priority import TRAINS
from minivlm.workflow.cluster import connect, disconnect

def policies(process_id):
    return sorted({os.sched_getscheduler(int(thread)) for thread in os.listdir(f"/proc/{process_id}/task")})

config = load_config(Path(sys.argv[1]), sys.argv[3:])
connect(config, trainers_first=sys.argv[2] == "trains")
family = psutil.Process().children(recursive=True)
[raylet] = [process.pid for process in family if process.name() == "raylet"]
spare = [process for process in family if process.ppid() == raylet and not process.name().endswith("Agent")]
core = [(process.name(), policies(process.pid)) for process in family if process not in spare]  # spares come any time
task = ray.remote(lambda: (policies(os.getpid()), os.nice(0)))
training = {"env_vars": {TRAINS: "1"}}
found = {"core": core, "task": ray.get(task.remote()), "trains": ray.get(task.options(runtime_env=training).remote())}
disconnect()
print("FOUND", json.dumps(found))
"""


@pytest.fixture
def found(
    request: pytest.FixtureRequest, tiny_config: Path, tmp_path: Path, free_ports: Callable[[int], list[int]]
) -> dict[str, object]:
    """Scheduling policies of the threads of processes by name, of a task's process and of a training worker's."""
    settings = [f"storage_path={tmp_path}", f"cluster.dashboard_port={free_ports(1)[0]}", "cluster.num_cpus=2"]
    command = [sys.executable, "-c", SCRIPT, str(tiny_config), request.param, *settings]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_worker_niceness"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    lines = run.stdout.splitlines()
    [line] = [line for line in lines if line.startswith("FOUND")]
    return dict(json.loads(line.removeprefix("FOUND")))


@pytest.mark.parametrize("found", ["trains"], indirect=True)
def test_all_but_training_workers_and_rays_core_stand_back(found: dict[str, object]):
    core = found.pop("core")
    assert isinstance(core, list)
    never_idle = [policies for name, policies in core if name in ("raylet", "gcs_server")]
    others = [policies for name, policies in core if name not in ("raylet", "gcs_server")]
    assert never_idle == [[os.SCHED_OTHER]] * 2
    assert len(others) > 10
    assert others == [[os.SCHED_IDLE]] * len(others)
    code = "import os; from minivlm.priority import take_place; take_place(); print(os.nice(0))"
    first = int(subprocess.check_output([sys.executable, "-c", code], env={**os.environ, TRAINS: "1"}))
    assert found == {"task": [[os.SCHED_IDLE], 0], "trains": [[os.SCHED_OTHER], first]}


@pytest.mark.parametrize("found", ["does not"], indirect=True)
def test_nothing_stands_back_where_nothing_trains(found: dict[str, object]):
    core = found.pop("core")
    assert isinstance(core, list)
    assert [policies for _, policies in core] == [[os.SCHED_OTHER]] * len(core)
    assert found == {"task": [[os.SCHED_OTHER], 0], "trains": [[os.SCHED_OTHER], 0]}
