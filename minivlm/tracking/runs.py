"""MLflow runs: parameters, tags, metric curves, sample panels. One writer: the process that calls this.

    with start_run(config, "pipeline", key=...) as pipeline:
        with start_run(config, "sft", key=..., parent=pipeline) as run, run.follow(run_dir / "metrics.jsonl"):
            run_stage(config, "sft")

The same key under the same parent is the same run: typing a command again goes on with it.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from minivlm.config import Config
from minivlm.log import get_logger
from minivlm.storage import content_hash
from minivlm.tracking.client import TrackingError, connect, experiment_id, explained, shown_uri
from minivlm.tracking.curves import CurveFollower
from minivlm.tracking.panel import panel_html
from minivlm.tracking.provenance import provenance_tags

KEY_TAG = "minivlm.key"
MAX_PARAMS_PER_CALL = 100
MAX_METRICS_PER_CALL = 1000
NOT_IN_KEY = {"storage_path", "cluster", "tracking", "serve"}

log = get_logger(__name__)


class Run:
    """One MLflow run, made by `start_run`. Leaving the `with` ends it: FINISHED, or FAILED on an exception."""

    def __init__(self, config: Config, client: MlflowClient, run_id: str, name: str) -> None:
        self.config = config
        self.client = client
        self.run_id = run_id
        self.name = name

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        status = "FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED"
        try:
            with explained(self.config):
                self.client.set_terminated(self.run_id, status)
        except TrackingError as failure:
            if error is None:
                raise
            log.warning("%s", failure)  # the error on its way out matters more

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings once: MLflow never changes a parameter, so those of an earlier attempt stay."""
        with explained(self.config):
            known = self.client.get_run(self.run_id).data.params
            new = [Param(key, str(value)) for key, value in params.items() if key not in known]
            for start in range(0, len(new), MAX_PARAMS_PER_CALL):
                self.client.log_batch(self.run_id, params=new[start : start + MAX_PARAMS_PER_CALL])

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at one step. The same number at the same step is logged once, so a repeated command adds none."""
        now = int(time.time() * 1000)
        with explained(self.config):
            points = [
                Metric(key, float(value), now, step)
                for key, value in metrics.items()
                if (step, float(value)) not in self._points(key)
            ]
            for start in range(0, len(points), MAX_METRICS_PER_CALL):
                self.client.log_batch(self.run_id, metrics=points[start : start + MAX_METRICS_PER_CALL])

    def _points(self, key: str) -> set[tuple[int, float]]:
        return {(point.step, point.value) for point in self.client.get_metric_history(self.run_id, key)}

    def log_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; an existing one is replaced."""
        with explained(self.config):
            for key, value in tags.items():
                self.client.set_tag(self.run_id, key, str(value))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file with the run, in `folder` of its artifacts."""
        with explained(self.config):
            self.client.log_artifact(self.run_id, str(path), folder)

    def log_artifacts(self, directory: Path, folder: str | None = None) -> None:
        """Keep a directory's content with the run, in `folder` of its artifacts."""
        with explained(self.config):
            self.client.log_artifacts(self.run_id, str(directory), folder)

    def log_text(self, text: str, path: str) -> None:
        """Keep a text with the run, at `path` among its artifacts."""
        with explained(self.config):
            self.client.log_text(self.run_id, text, path)

    def log_panel(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep rows (questions, answers, pictures as `data:image/..` URLs) as panels/NAME.json and .html."""
        with explained(self.config):
            self.client.log_dict(self.run_id, {"rows": [dict(row) for row in rows]}, f"panels/{name}.json")
        self.log_text(panel_html(name, rows), f"panels/{name}.html")

    @contextmanager
    def follow(self, metrics_jsonl: Path, *, interval_s: float = 2.0) -> Iterator[None]:
        """Log the curves that a training run appends to `metrics_jsonl`, while the `with` lasts and once at its end.

        Each (metric, step) is logged once, however often training restarts or this is called. The file may not exist
        yet. While MLflow does not answer, points wait; training goes on.
        """
        follower = CurveFollower(self.client, self.run_id, metrics_jsonl, interval_s=interval_s)
        follower.start()
        try:
            yield
        finally:
            follower.stop()


def start_run(
    config: Config,
    name: str,
    *,
    key: str | None = None,
    parent: Run | None = None,
    tags: Mapping[str, Any] | None = None,
    params: Mapping[str, str] | None = None,
) -> Run:
    """Open the run of this key below this parent, or make it; log the settings and where they come from.

    Args:
        name: shown in the UI, and part of the key.
        key: names what determines the result, such as `layout.run_dir(config, stage).name`. Default: the settings'
            hash (without storage, cluster, tracking and serving, which change no result).
        tags: extra tags, such as the stage.
        params: what to log as parameters. Default: the settings as `group.key`.

    Raises:
        TrackingError: MLflow is out of reach.
    """
    client = connect(config)
    experiment = experiment_id(config, client)
    full_key = "/".join([parent.run_id if parent else "top", name, key or config_key(config)])
    all_tags = {**provenance_tags(config), "tracking_uri": shown_uri(config), **(tags or {}), KEY_TAG: full_key}
    if parent:
        all_tags["mlflow.parentRunId"] = parent.run_id
    with explained(config):
        found = client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{full_key}'", max_results=1)
        if found:
            run_id = found[0].info.run_id
            client.update_run(run_id, status="RUNNING")
        else:
            run_id = client.create_run(experiment, run_name=name).info.run_id
    run = Run(config, client, run_id, name)
    run.log_tags(all_tags)
    run.log_params(params or flatten(config))
    run.log_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), "config.yaml")
    return run


def config_key(config: Config) -> str:
    """Hash of the settings that can change a result."""
    return content_hash(config.model_dump(mode="json", exclude=NOT_IN_KEY))


def flatten(config: Config) -> dict[str, str]:
    """Settings as `group.key` -> text, the form in which overrides are typed. A server's password is left out."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else key, item)
        else:
            flat[prefix] = str(value)

    walk("", config.model_dump(mode="json"))
    if config.tracking.uri:
        flat["tracking.uri"] = shown_uri(config)
    return flat
