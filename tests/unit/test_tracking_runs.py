"""MLflow runs on a real SQLite database: one run per key, curves without doubles, honest status, clear outages."""

import json
import socket
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from minivlm.config import Config, ConfigError
from minivlm.tracking.client import check_tracking, connect, experiment_id, tracking_uri
from minivlm.tracking.panel import panel_html
from minivlm.tracking.runs import start_run
from minivlm.tracking.sweep import log_search


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config(storage_path=tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def client(config: Config) -> MlflowClient:
    return connect(config)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def points(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))


def test_default_database_lies_under_the_storage_root(config):
    assert tracking_uri(config) == f"sqlite:///{config.root}/mlflow/mlflow.db"
    with start_run(config, "place") as run:
        run.log_text("hello", "note.txt")
    assert list((config.root / "mlflow" / "artifacts").rglob("note.txt"))


def test_the_same_key_under_the_same_parent_is_the_same_run(config, client):
    with start_run(config, "pipeline", key="a") as parent, start_run(config, "sft", key="k", parent=parent) as child:
        pass
    with start_run(config, "pipeline", key="a") as again, start_run(config, "sft", key="k", parent=again) as second:
        assert client.get_run(child.run_id).info.status == "RUNNING"
    with start_run(config, "pipeline", key="b") as other, start_run(config, "sft", key="k", parent=other) as third:
        pass
    assert (again.run_id, second.run_id) == (parent.run_id, child.run_id)
    assert third.run_id != child.run_id
    assert client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_a_run_ends_as_failed_when_its_body_raises(config, client):
    with pytest.raises(ZeroDivisionError), start_run(config, "broken") as run:
        _ = 1 / 0
    assert client.get_run(run.run_id).info.status == "FAILED"


def test_settings_and_origin_are_recorded_without_passwords(config, client):
    with start_run(config, "record") as run:
        pass
    data = client.get_run(run.run_id).data
    assert data.params["train.mpo.beta"] == "0.1"
    assert data.tags["seed"] == "0"
    assert {"git_commit", "config_hash", "version.torch"} <= set(data.tags)
    assert len(data.params) > 100, "more than one call's worth"


def test_repeated_final_metrics_add_no_point(config, client):
    for _ in range(2):
        with start_run(config, "final", key="x") as run:
            run.log_metrics({"eval/macro/accuracy": 0.5}, step=3)
    assert points(client, run.run_id, "eval/macro/accuracy") == [(3, 0.5)]


def test_curves_are_followed_while_the_file_grows(config, client, tmp_path):
    path = tmp_path / "metrics.jsonl"
    with start_run(config, "growing") as run, run.follow(path, interval_s=0.05):
        write_lines(path, [{"step": 1, "train/loss": 4.0, "note": "text"}])
        deadline = time.monotonic() + 5
        while not points(client, run.run_id, "train/loss") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert points(client, run.run_id, "train/loss") == [(1, 4.0)]
        with path.open("a") as file:
            file.write('{"step": 2, "train/loss": 3.0, "val/loss": 3.5}\n{"step": 3, "train/lo')
    assert points(client, run.run_id, "train/loss") == [(1, 4.0), (2, 3.0)]
    assert points(client, run.run_id, "val/loss") == [(2, 3.5)]


def test_a_restart_that_rewrites_lines_doubles_no_point(config, client, tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": s, "train/loss": float(s)} for s in range(1, 6)])
    with start_run(config, "restart", key="r") as first, first.follow(path, interval_s=0.05):
        pass
    write_lines(path, [{"step": s, "train/loss": float(s)} for s in range(1, 4)])  # checkpoint at step 3
    with start_run(config, "restart", key="r") as second, second.follow(path, interval_s=0.05):
        time.sleep(0.15)
        write_lines(path, [{"step": s, "train/loss": float(s)} for s in range(1, 3)])  # and a second one at step 2
        time.sleep(0.15)
        with path.open("a") as file:
            file.writelines(json.dumps({"step": s, "train/loss": float(s)}) + "\n" for s in range(3, 9))
    assert second.run_id == first.run_id
    assert points(client, first.run_id, "train/loss") == [(s, float(s)) for s in range(1, 9)]


def test_long_curves_pass_the_limit_of_one_call(config, client, tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": s, "train/loss": 1.0, "lr": 0.1} for s in range(1, 1251)])
    with start_run(config, "long") as run, run.follow(path):
        pass
    assert len(points(client, run.run_id, "lr")) == 1250


def test_an_unreachable_server_is_one_line_that_says_what_to_type(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = Config.model_validate({"tracking": {"uri": f"http://user:secret@127.0.0.1:{port}"}})
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        check_tracking(config)
    message = str(caught.value)
    assert f"MLflow at http://127.0.0.1:{port} failed" in message
    assert "mlflow server" in message
    assert "secret" not in message
    assert "\n" not in message
    assert time.monotonic() - started < 10


def test_a_database_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"MLflow at sqlite:.*Check that .*/file/mlflow can be written"):
        check_tracking(Config(storage_path=tmp_path / "file"))


def test_a_deleted_experiment_names_the_setting(config, client):
    other = config.model_copy(update={"tracking": config.tracking.model_copy(update={"experiment": "old"})})
    client.delete_experiment(experiment_id(other, client))
    with pytest.raises(ConfigError, match=r"tracking\.experiment="):
        check_tracking(other)


def test_sweep_trials_become_nested_runs_once(config, client):
    linear, deep = ["model.projector=linear"], ["model.projector=mlp2x_gelu"]
    finished = {"name": "trial-0", "status": "finished", "overrides": linear, "val_loss": 2.0}
    stopped = {"name": "trial-1", "status": "stopped", "overrides": deep, "val_loss": 4.0}
    trials = [finished | {"curve": [[20, 3.0], [40, 2.0]]}, stopped | {"curve": [[20, 4.0]]}]
    for _ in range(2):
        with start_run(config, "sweep", key="s") as sweep:
            log_search(config, trials, linear, 2.0, sweep)
    found = client.search_runs([experiment_id(config, client)], f"tags.mlflow.parentRunId = '{sweep.run_id}'")
    by_name = {run.info.run_name: run for run in found}
    assert len(found) == 2
    assert by_name["trial-0"].data.params["model.projector"] == "linear"
    assert by_name["trial-1"].data.tags["trial_status"] == "stopped"
    assert points(client, by_name["trial-0"].info.run_id, "val/loss") == [(20, 3.0), (40, 2.0)]
    assert client.get_run(sweep.run_id).data.tags["best_overrides"] == "model.projector=linear"


def test_panels_escape_text_and_show_pictures_of_known_types_only():
    picture = "data:image/png;base64,aGVsbG8="
    page = panel_html("t", [{"answer": "<script>x</script>", "picture": picture}, {"picture": f'{picture}" onload="x'}])
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert page.count("<img") == 1
    assert panel_html("t", [{"pictures": [picture, picture]}]).count("<img") == 2
