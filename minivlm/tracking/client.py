"""The connection to MLflow: where it is, how it is set up, and what a failure means in one line.

`check_tracking` is called before work starts; runs and the registry get their client from `connect`.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from mlflow.exceptions import MlflowException
from mlflow.telemetry import set_telemetry_client
from mlflow.tracking import MlflowClient

from minivlm import layout
from minivlm.config import Config, ConfigError

REQUIRED_ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
DEFAULT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class TrackingError(ConfigError):
    """MLflow is out of reach or lacks what was asked for; the message says what to type."""


def tracking_uri(config: Config) -> str:
    """The configured server, else SQLite under storage_path (an absolute path: workers stand elsewhere)."""
    return config.tracking.uri or f"sqlite:///{layout.mlflow_dir(config) / 'mlflow.db'}"


def shown_uri(config: Config) -> str:
    """`tracking_uri` without user name and password, for messages and tags."""
    uri = tracking_uri(config)
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else uri


def connect(config: Config) -> MlflowClient:
    """A client with telemetry and pickles off and short retries. The first call of a process makes the database."""
    os.environ.update(REQUIRED_ENVIRONMENT)
    for name, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    set_telemetry_client()  # drops the one that importing MLflow made
    with explained(config):
        if config.tracking.uri is None:
            layout.mlflow_dir(config).mkdir(parents=True, exist_ok=True)
        return MlflowClient(tracking_uri(config))


@contextmanager
def explained(config: Config) -> Iterator[None]:
    """Turn what MLflow or the disk raises inside into a `TrackingError` of one line."""
    try:
        yield
    except (MlflowException, OSError) as error:
        if config.tracking.uri is None:
            advice = f"Check that {layout.mlflow_dir(config)} can be written, or set tracking.uri=http://HOST:PORT."
        else:
            advice = "Start it (`mlflow server`), or leave tracking.uri out to use SQLite under storage_path."
        raise TrackingError(f"MLflow at {shown_uri(config)} failed: {one_line(error)}. {advice}") from error


def one_line(error: Exception) -> str:
    """The gist of an MLflow error, without the password that a server's address may carry."""
    text = str(error)
    if "Max retries exceeded" in text:
        return "it does not answer"
    first = (text.splitlines() or [type(error).__name__])[0][:200]
    return re.sub(r"//[^/@\s]+@", "//", first).rstrip(". ")


def experiment_id(config: Config, client: MlflowClient) -> str:
    """The configured experiment, created where it is missing.

    Raises:
        TrackingError: MLflow is out of reach, or the experiment lies in MLflow's bin.
    """
    name = config.tracking.experiment
    with explained(config):
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            place = None if config.tracking.uri else (layout.mlflow_dir(config) / "artifacts").as_uri()
            return str(client.create_experiment(name, artifact_location=place))
    if experiment.lifecycle_stage != "active":
        raise TrackingError(f"The MLflow experiment `{name}` was deleted: type tracking.experiment=OTHER_NAME")
    return str(experiment.experiment_id)


def check_tracking(config: Config) -> None:
    """Raise `TrackingError` now rather than after hours of training."""
    experiment_id(config, connect(config))
