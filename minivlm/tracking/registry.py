"""The model registry: a version per export, aliases that say which one serves, and the gate between them.

`@challenger` waits, `@champion` serves, `@previous` is the way back. A version is an artifact of the run that made it:
the export's files, README.md (the model card) and manifest.json (sha256 of every file). Tags carry what the gate reads.
"""

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from minivlm.config import Config
from minivlm.log import get_logger
from minivlm.storage import file_sha256, new_directory
from minivlm.tracking.client import TrackingError, connect, explained, shown_uri
from minivlm.tracking.runs import Run

GATE_METRIC = "eval/macro/accuracy"
"""Test accuracy averaged over the tasks, in [0, 1]; the gate compares it."""

CARD, MANIFEST = "README.md", "manifest.json"
REQUIRED_FILES = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json")
MISSING = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}  # no such model, no such alias

log = get_logger(__name__)


@dataclass(frozen=True)
class PromotionResult:
    """What the gate decided. `champion` is the version that serves now, None where there is none."""

    promoted: bool
    reason: str
    version: int
    champion: int | None


@dataclass(frozen=True)
class ChampionVersion:
    """A champion on this machine: `path` is a complete export, `digest` the sha256 that names its content."""

    version: int
    path: Path
    digest: str


def register_candidate(
    config: Config, export_dir: Path, metrics: Mapping[str, float], card_text: str, run: Run, *, questions: str
) -> int:
    """Register an export as a version of `tracking.model_name` and point `@challenger` at it.

    The same export is one version, however often it is registered; its metrics and questions are then updated.

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
    if gap := _gap(set(files)):
        raise TrackingError(f"{export_dir} is no complete export: {gap}. Run: python -m jobs.export")
    digest = export_digest(files)
    name = config.tracking.model_name
    client = connect(config)
    tags = {"digest": digest, "questions": questions, "metrics": json.dumps(dict(metrics), sort_keys=True)}
    with explained(config):
        version = _version_with(client, name, digest)
        if version is None:
            folder = _folder(digest)
            client.log_artifacts(run.run_id, str(export_dir), folder)
            client.log_dict(run.run_id, {"digest": digest, "files": files}, f"{folder}/{MANIFEST}")
            client.log_text(run.run_id, card_text, f"{folder}/{CARD}")
            if not client.search_registered_models(f"name = '{name}'"):
                client.create_registered_model(name)
            version = client.create_model_version(name, f"runs:/{run.run_id}/{folder}", run.run_id, tags=tags)
        for key, value in tags.items():
            client.set_model_version_tag(name, str(version.version), key, value)
        client.update_model_version(name, str(version.version), card_text)
    number = int(version.version)
    if _alias(config, client, "champion") != number:
        with explained(config):
            client.set_registered_model_alias(name, "challenger", str(number))
    return number


def promote(config: Config, version: int) -> PromotionResult:
    """Let `version` serve if it passes the gate: complete, finite, and better than the champion on equal questions.

    On success `@previous` takes the old champion and `@challenger` is freed; on refusal nothing moves. A repeated
    call after an interruption finishes the moves.

    Raises:
        TrackingError: no such version, or MLflow is out of reach.
    """
    name = config.tracking.model_name
    client = connect(config)
    candidate = _get_version(config, client, version)
    champion = _alias(config, client, "champion")
    if champion == version:
        _free_challenger(config, client, version)
        return PromotionResult(True, f"version {version} is the champion already", version, champion)
    reason = _refusal(config, client, candidate, champion)
    if reason:
        log.info("Version %d of %s is not promoted: %s", version, name, reason)
        return PromotionResult(False, reason, version, champion)
    with explained(config):
        if champion is not None:
            client.set_registered_model_alias(name, "previous", str(champion))
        client.set_registered_model_alias(name, "champion", str(version))
    _free_challenger(config, client, version)
    better = f"better than version {champion}" if champion is not None else "the first champion"
    return PromotionResult(True, f"{GATE_METRIC} {_score(candidate):.4f}, {better}", version, version)


def resolve_champion(config: Config) -> ChampionVersion:
    """The champion's export on this machine, downloaded once per content to storage_path/models/DIGEST.

    Raises:
        TrackingError: there is no champion, its files differ from their manifest, or MLflow is out of reach.
    """
    name = config.tracking.model_name
    client = connect(config)
    number = _alias(config, client, "champion")
    if number is None:
        raise TrackingError(
            f"No champion of model `{name}` at {shown_uri(config)}: nothing was promoted yet. "
            "Run: python -m jobs.pipeline --config configs/tiny.yaml"
        )
    version = _get_version(config, client, number)
    digest = _tag(version, "digest")
    path = config.root / "models" / digest
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_directory(path) as staging:
            _download(config, client, version, staging)
            found = export_digest(export_files(staging))
            if found != digest:
                raise TrackingError(
                    f"Version {number} of `{name}` is damaged: its files hash to {found[:12]}, registered was "
                    f"{digest[:12]}. Train again, or move @champion to another version."
                )
    return ChampionVersion(number, path, digest)


def export_files(directory: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file but the card and the manifest, which describe them."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    named = {path.relative_to(directory).as_posix(): path for path in paths}
    return {name: file_sha256(path) for name, path in named.items() if name not in (CARD, MANIFEST)}


def export_digest(files: Mapping[str, str]) -> str:
    """sha256 over names and contents: equal digests are equal exports."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def _gap(names: set[str]) -> str:
    missing = [name for name in REQUIRED_FILES if name not in names]
    if not any(name.endswith(".safetensors") for name in names):
        missing.append("*.safetensors")
    return f"it lacks {', '.join(missing)}" if missing else ""


def _refusal(config: Config, client: MlflowClient, candidate: ModelVersion, champion: int | None) -> str:
    """Why the candidate must not serve; empty if it may."""
    if not math.isfinite(_score(candidate)):
        return f"{GATE_METRIC} is {_score(candidate)}, not a finite number"
    bad = [key for key, value in _metrics(candidate).items() if not math.isfinite(value)]
    if bad:
        return f"metric `{bad[0]}` is not a finite number"
    if gap := _artifact_gap(config, client, candidate):
        return gap
    if champion is None:
        return ""
    other = _get_version(config, client, champion)
    asked, other_asked = _tag(candidate, "questions"), _tag(other, "questions")
    if asked != other_asked:
        return (
            f"it was tested on other questions ({asked}) than champion {champion} ({other_asked}): "
            "evaluate both with the same data and evaluation settings"
        )
    if _score(candidate) <= _score(other):
        return f"{GATE_METRIC} {_score(candidate):.4f} does not beat champion {champion} with {_score(other):.4f}"
    return ""


def _artifact_gap(config: Config, client: MlflowClient, version: ModelVersion) -> str:
    """What the stored artifact lacks against its manifest; empty if complete."""
    folder = _folder(_tag(version, "digest"))
    with explained(config):
        stored = {path.removeprefix(f"{folder}/") for path in _list(client, version.run_id, folder)}
    if MANIFEST not in stored:
        return f"its {MANIFEST} is missing"
    with tempfile.TemporaryDirectory() as target, explained(config):
        path = client.download_artifacts(version.run_id, f"{folder}/{MANIFEST}", target)
        manifest = json.loads(Path(path).read_text())
    if manifest.get("digest") != _tag(version, "digest") or export_digest(manifest["files"]) != manifest["digest"]:
        return f"its {MANIFEST} is of another export"
    missing = sorted(set(manifest["files"]) - stored)
    return f"{missing[0]} is missing from its files" if missing else _gap(stored)


def _folder(digest: str) -> str:
    """Artifact folder of an export: one run may register several."""
    return f"model-{digest[:12]}"


def _list(client: MlflowClient, run_id: str, folder: str) -> list[str]:
    """Paths of all files below an artifact folder."""
    paths: list[str] = []
    for item in client.list_artifacts(run_id, folder):
        paths += _list(client, run_id, item.path) if item.is_dir else [item.path]
    return paths


def _tag(version: ModelVersion, key: str) -> str:
    """A tag that `register_candidate` writes; the digest becomes a path, so its form is checked."""
    value = str(version.tags.get(key, ""))
    if not value or (key == "digest" and not re.fullmatch(r"[0-9a-f]{64}", value)):
        raise TrackingError(
            f"Version {version.version} of `{version.name}` has no valid tag `{key}`: it was not registered by this "
            "project. Run: python -m jobs.register"
        )
    return value


def _metrics(version: ModelVersion) -> dict[str, float]:
    metrics: dict[str, float] = json.loads(_tag(version, "metrics"))
    return metrics


def _score(version: ModelVersion) -> float:
    return float(_metrics(version)[GATE_METRIC])


def _download(config: Config, client: MlflowClient, version: ModelVersion, target: Path) -> None:
    folder = _folder(_tag(version, "digest"))
    with tempfile.TemporaryDirectory(dir=target.parent) as place, explained(config):
        Path(client.download_artifacts(version.run_id, folder, place)).rename(target)


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


def _free_challenger(config: Config, client: MlflowClient, version: int) -> None:
    if _alias(config, client, "challenger") == version:
        with explained(config):
            client.delete_registered_model_alias(config.tracking.model_name, "challenger")
