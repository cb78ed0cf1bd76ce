"""The model registry: a version per export, aliases that say which one serves, and what is kept with a version.

`@challenger` waits, `@champion` serves, `@previous` is the way back; `workflow.register` decides. A version is an
artifact of the run that made it: model-D/ with the export's files, card and manifest (`tracking.manifest`), and
evaluation-D/QUESTIONS/ with its answers, question by question, for later comparisons. D begins the files' digest.
"""

import fcntl
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from minivlm import layout
from minivlm.config import Config
from minivlm.storage import new_directory
from minivlm.tracking.client import TrackingError, connect, explained, shown_uri
from minivlm.tracking.manifest import CARD, MANIFEST, export_digest, export_files, missing_files
from minivlm.tracking.provenance import provenance_tags
from minivlm.tracking.runs import Run

GATE_METRIC = "eval/macro/accuracy"
"""Test accuracy averaged over the tasks, in [0, 1]; the gate compares it."""

GATE_TAG = "gate"
"""Tag of a version: `passed`, or the name of the gate that refused it."""

FILE_GATES = ("complete", "finite", "reloads")
"""Gates that judge what is stored."""

MISSING = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}  # no such model, no such alias


@dataclass(frozen=True)
class ChampionVersion:
    """A champion on this machine: `path` is a complete export, `digest` the sha256 that names its content."""

    version: int
    path: Path
    digest: str


def register_candidate(
    config: Config,
    export_dir: Path,
    metrics: Mapping[str, float],
    card_text: str,
    run: Run,
    *,
    questions: str,
) -> int:
    """Register an export as a version of `tracking.model_name` and point `@challenger` at it.

    The same export is one version, however often it is registered; its metrics, questions, manifest and card are then
    updated. Its files are stored anew if a gate found fault with them, or if it is the champion: no gate looks at that
    one any more, and what serves must be whole.

    Args:
        export_dir: a stock transformers folder (safetensors and JSON).
        metrics: test metrics, `eval/macro/accuracy` among them.
        card_text: the model card, kept as README.md.
        run: the run that the artifact belongs to.
        questions: names the evaluation questions; versions are compared only where it is equal.

    Raises:
        TrackingError: the export or the metric is missing, or MLflow is out of reach.
    """
    if GATE_METRIC not in metrics:
        raise TrackingError(f"Metrics of {export_dir} lack `{GATE_METRIC}`. Run: python -m jobs.evaluate")
    files = export_files(export_dir)
    if lacking := missing_files(set(files)):
        raise TrackingError(
            f"{export_dir} is no complete export: it lacks {', '.join(lacking)}. Run: python -m jobs.export"
        )
    digest = export_digest(files)
    name, folder = config.tracking.model_name, _folder(digest)
    client = connect(config)
    champion = champion_number(config)
    tags = {"digest": digest, "questions": questions, "metrics": json.dumps(dict(metrics), sort_keys=True)}
    with explained(config):
        version = _version_with(client, name, digest)
        run_id = version.run_id if version else run.run_id
        if version is None or version.tags.get(GATE_TAG) in FILE_GATES or int(version.version) == champion:
            client.log_artifacts(run_id, str(export_dir), folder)
        manifest = {"digest": digest, "files": files, "provenance": provenance_tags(config)}
        client.log_dict(run_id, manifest, f"{folder}/{MANIFEST}")
        if version is None:
            if not client.search_registered_models(f"name = '{name}'"):
                client.create_registered_model(name)
            version = client.create_model_version(name, f"runs:/{run_id}/{folder}", run_id, tags=tags)
        for key, value in tags.items():
            client.set_model_version_tag(name, str(version.version), key, value)
    number = int(version.version)
    write_card(config, number, card_text)
    if champion != number:
        with explained(config):
            client.set_registered_model_alias(name, "challenger", str(number))
    return number


def make_champion(config: Config, version: int, *, instead_of: int | None) -> bool:
    """Let `version` serve: `@previous` takes the old champion, and `@challenger` is freed.

    Args:
        instead_of: the champion that it was compared with. If another one serves by now nothing moves, as the
            comparison is void. MLflow has no conditional write: between this look and the move lie some milliseconds,
            which `promotion_lock` covers among all who share storage_path.

    Returns:
        Whether it moved.

    Raises:
        TrackingError: no such version, or MLflow is out of reach.
    """
    name, client = config.tracking.model_name, connect(config)
    _get_version(config, client, version)
    if champion_number(config) != instead_of:
        return False
    with explained(config):
        if instead_of is not None:
            client.set_registered_model_alias(name, "previous", str(instead_of))
        client.set_registered_model_alias(name, "champion", str(version))
    free_challenger(config, version)
    return True


@contextmanager
def promotion_lock(config: Config) -> Iterator[None]:
    """One registration at a time among all processes that share storage_path; others wait.

    Drivers with another storage_path at one tracking server are not kept out; see `make_champion`.
    """
    path = layout.mlflow_dir(config) / "promotion.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system frees it when the process ends, however it ends
        yield


def champion_number(config: Config) -> int | None:
    """The version that serves; None where there is none."""
    return _alias(config, connect(config), "champion")


def free_challenger(config: Config, version: int) -> None:
    """Take `@challenger` away from a version that serves."""
    client = connect(config)
    if _alias(config, client, "challenger") == version:
        with explained(config):
            client.delete_registered_model_alias(config.tracking.model_name, "challenger")


def version_digest(config: Config, version: int) -> str:
    """The digest under which a version was registered.

    Raises:
        TrackingError: no such version, or one that this project did not register.
    """
    return _tag(_get_version(config, connect(config), version), "digest")


def download_version(config: Config, version: int, target: Path) -> None:
    """All files of a version as they are stored, card and manifest included, into an existing folder."""
    client = connect(config)
    found = _get_version(config, client, version)
    _download(config, client, found.run_id, _folder(_tag(found, "digest")), target)


def keep_evaluation(config: Config, version: int, questions: str, evaluation: Path) -> None:
    """Keep the files of an evaluation with a version, under the name of its questions."""
    client = connect(config)
    found = _get_version(config, client, version)
    folder = _evaluation_folder(_tag(found, "digest"), questions)
    with explained(config):
        for name in ("samples.jsonl", "results.json"):
            client.log_artifact(found.run_id, str(evaluation / name), folder)


def find_evaluation(config: Config, version: int, questions: str, target: Path) -> bool:
    """Download the evaluation of a version on these questions into an existing folder; False where none is kept."""
    client = connect(config)
    found = _get_version(config, client, version)
    folder = _evaluation_folder(_tag(found, "digest"), questions)
    with explained(config):
        if not client.list_artifacts(found.run_id, folder):
            return False
    _download(config, client, found.run_id, folder, target)
    return True


def write_card(config: Config, version: int, card_text: str, gate: str | None = None) -> None:
    """Replace the card of a version, in its files and as its description; `gate` becomes its tag."""
    client, name = connect(config), config.tracking.model_name
    found = _get_version(config, client, version)
    with explained(config):
        client.log_text(found.run_id, card_text, f"{_folder(_tag(found, 'digest'))}/{CARD}")
        client.update_model_version(name, str(version), card_text)
        if gate is not None:
            client.set_model_version_tag(name, str(version), GATE_TAG, gate)


def resolve_champion(config: Config) -> ChampionVersion:
    """The champion's export on this machine, downloaded once per content to storage_path/models/DIGEST.

    Raises:
        TrackingError: there is no champion, its files differ from their manifest, or MLflow is out of reach.
    """
    name = config.tracking.model_name
    number = champion_number(config)
    if number is None:
        raise TrackingError(
            f"No champion of model `{name}` at {shown_uri(config)}: nothing was promoted yet. "
            "Run: python -m jobs.pipeline --config configs/tiny.yaml"
        )
    digest = version_digest(config, number)
    path = config.root / "models" / digest
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_directory(path) as staging:
            download_version(config, number, staging)
            found = export_digest(export_files(staging))
            if found != digest:
                raise TrackingError(
                    f"Version {number} of `{name}` is damaged: its files hash to {found[:12]}, registered was "
                    f"{digest[:12]}. Train again, or move @champion to another version."
                )
    return ChampionVersion(number, path, digest)


def _folder(digest: str) -> str:
    """Artifact folder of an export: one run may register several."""
    return f"model-{digest[:12]}"


def _evaluation_folder(digest: str, questions: str) -> str:
    return f"evaluation-{digest[:12]}/{re.sub(r'[^0-9A-Za-z]', '-', questions)}"


def _tag(version: ModelVersion, key: str) -> str:
    """A tag that `register_candidate` writes; the digest becomes a path, so its form is checked."""
    value = str(version.tags.get(key, ""))
    if not value or (key == "digest" and not re.fullmatch(r"[0-9a-f]{64}", value)):
        raise TrackingError(
            f"Version {version.version} of `{version.name}` has no valid tag `{key}`: it was not registered by this "
            "project. Run: python -m jobs.register"
        )
    return value


def _download(config: Config, client: MlflowClient, run_id: str, folder: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as place, explained(config):
        Path(client.download_artifacts(run_id, folder, place)).rename(target)


def _version_with(client: MlflowClient, name: str, digest: str) -> ModelVersion | None:
    versions = client.search_model_versions(f"name = '{name}'")
    return next((version for version in versions if version.tags.get("digest") == digest), None)


def _get_version(config: Config, client: MlflowClient, version: int) -> ModelVersion:
    try:
        return client.get_model_version(config.tracking.model_name, str(version))
    except MlflowException as error:
        if error.error_code not in MISSING:
            with explained(config):
                raise
        name = config.tracking.model_name
        raise TrackingError(f"Model `{name}` has no version {version} at {shown_uri(config)}") from None


def _alias(config: Config, client: MlflowClient, alias: str) -> int | None:
    """Version that an alias points at; None where the model or the alias does not exist."""
    try:
        return int(client.get_model_version_by_alias(config.tracking.model_name, alias).version)
    except MlflowException as error:
        if error.error_code in MISSING:
            return None
        with explained(config):
            raise
