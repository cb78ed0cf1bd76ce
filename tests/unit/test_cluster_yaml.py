"""cluster.yaml and configs/gpu.yaml: valid, closed to the outside, and consistent with each other."""

import json
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from minivlm.config import load_config

REPOSITORY = Path(__file__).parent.parent.parent
GPUS_AND_CPUS = {"g6e.12xlarge": (4, 48)}
SCHEMA = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"


@pytest.fixture(scope="module")
def cluster():
    return yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())


def start_commands(cluster):
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


def test_it_follows_rays_own_schema(cluster):
    jsonschema.validate(cluster, json.loads(SCHEMA.read_text()))


def test_every_node_asks_for_the_token(cluster):
    assert len(start_commands(cluster)) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in start_commands(cluster))
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_dashboard_stays_on_loopback(cluster):
    head = [command for command in start_commands(cluster) if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in head[0]
    assert "0.0.0.0" not in (REPOSITORY / "cluster.yaml").read_text()


def test_the_head_gives_no_cpu_to_work(cluster):
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"]["CPU"] == 0


def test_versions_come_from_the_lock(cluster):
    mounted = [local for local in cluster["file_mounts"].values() if local.endswith("requirements.lock")]
    assert (REPOSITORY / mounted[0]).is_file()
    assert any("requirements.lock" in command for command in cluster["setup_commands"])


def test_the_gpu_preset_loads_and_lies_on_the_mounted_file_system(cluster):
    config = load_config(REPOSITORY / "configs" / "gpu.yaml")
    mount = "/mnt/shared"
    assert any(mount in command for command in cluster["initialization_commands"])
    assert str(config.root).startswith(mount)
    assert config.train.use_gpu
    assert config.train.precision == "bfloat16"


def test_the_machines_that_are_always_there_fit_the_gpu_preset(cluster):
    train = load_config(REPOSITORY / "configs" / "gpu.yaml").train
    node = cluster["available_node_types"]["gpu"]
    gpus, cpus = GPUS_AND_CPUS[node["node_config"]["InstanceType"]]
    assert gpus < train.num_workers <= node["min_workers"] * gpus
    assert train.num_workers * train.cpus_per_worker < node["min_workers"] * cpus
