"""Models that answer: the export of a finished training stage, or any export folder under a name.

Evaluation and preference sampling start here.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from minivlm.config import Config, ConfigError, StageName
from minivlm.data.tokenizer import load_tokenizer
from minivlm.layout import run_dir, tokenizer_path
from minivlm.model.export import load_export_tower
from minivlm.storage import file_sha256, manifest_of


@dataclass(frozen=True)
class StageExport:
    """An export and the name that readers see. `reference` = 16 hex digits that stand for every weight and setting.

    Of a stage it is the last checkpoint and `reference` begins its manifest's sha256. Of a folder that no stage made,
    `stage` is None, `checkpoint_dir` the folder itself, and `reference` begins the sha256 of its files' digests.
    """

    name: str
    stage: StageName | None
    checkpoint_dir: Path
    export_dir: Path
    reference: str


def stage_export(config: Config, stage: StageName) -> StageExport:
    """Find the export of a finished stage.

    Raises:
        FileNotFoundError: the stage did not finish under this configuration, or its checkpoint is gone.
    """
    path = run_dir(config, stage) / "result.json"
    if not path.exists():
        raise FileNotFoundError(
            f"No finished {stage} run under {path.parent}: its checkpoint is needed here. "
            f"With the same --config and overrides, run: python -m jobs.train {stage}"
        )
    result = json.loads(path.read_text())
    checkpoint_dir, export_dir = Path(result["checkpoint_dir"]), Path(result["export_dir"])
    manifest = checkpoint_dir / "manifest.json"
    if not manifest.exists() or not export_dir.is_dir():
        raise FileNotFoundError(
            f"{path} names the checkpoint {checkpoint_dir}, which is incomplete or gone. "
            f"Delete {path} and run: python -m jobs.train {stage}"
        )
    return StageExport(stage, stage, checkpoint_dir, export_dir, file_sha256(manifest)[:16])


def folder_export(name: str, folder: Path) -> StageExport:
    """Any export folder, as `jobs.export` and every checkpoint hold one.

    Raises:
        ConfigError: no name, or no such folder.
    """
    folder = folder.expanduser().resolve()
    if not name.strip():
        raise ConfigError(f"the export {folder} needs a name: type evaluation.exports.NAME={folder}")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"evaluation.exports.{name}: {folder} holds no export (no config.json). Write one: "
            "python -m jobs.export sft FOLDER"
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = [[path.relative_to(folder).as_posix(), file_sha256(path)] for path in files]
    return StageExport(name, None, folder, folder, hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16])


def policy_export(config: Config) -> StageExport:
    """The model that answers questions, is MPO's reference and gives its initial weights: preferences.policy, else SFT.

    Raises:
        FileNotFoundError: SFT did not finish, or there is no such folder.
        ConfigError: the folder holds no export, or one of another tokenizer.
    """
    given = config.preferences.policy
    if given is None:
        return stage_export(config, "sft")
    folder = given.expanduser().absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder {folder}. Type preferences.policy=EXPORT, as the mpo or sft job printed it")
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        inner = " (its `export` folder?)" if (folder / "export").is_dir() else ""
        raise ConfigError(f"preferences.policy={folder} holds no config.json with safetensors, so no export{inner}")
    own = load_tokenizer(tokenizer_path(config))
    if load_tokenizer(folder).get_vocab() != own.get_vocab():
        raise ConfigError(
            f"preferences.policy={folder} has another tokenizer than these settings, which would garble every answer: "
            f"add tokenizer.path={folder}"
        )
    if manifest := manifest_of(folder):
        return StageExport("policy", None, folder.parent, folder, file_sha256(manifest)[:16])
    return folder_export("policy", folder)


def check_reference(folder: Path, export: StageExport) -> None:
    """Refuse pairs whose reference log-probabilities another checkpoint computed.

    Args:
        folder: of the pairs.

    Raises:
        ConfigError: they are stale, or there are none.
    """
    path = folder / "reference.json"
    if not path.exists():
        raise ConfigError(f"{folder} has no reference log-probabilities. Run: python -m jobs.preferences")
    stored = json.loads(path.read_text())["reference"]
    if stored != export.reference:
        raise ConfigError(
            f"{folder} holds reference log-probabilities of checkpoint {stored}, but MPO would start from "
            f"{export.reference} ({export.checkpoint_dir}): a wrong reference. Delete {folder} and run: "
            "python -m jobs.preferences"
        )


def check_tower(export: StageExport, fingerprint: str, precision: str, batch_size: int) -> None:
    """A folder that no stage of the configuration made must see what the feature cache holds.

    Args:
        fingerprint: of the tower that filled the cache, at this precision and batch size.

    Raises:
        ConfigError: it has another tower.
        CheckpointError: it has none that can be read.
    """
    if export.stage is not None:
        return
    found = load_export_tower(export.export_dir, precision=precision, batch_size=batch_size).fingerprint
    if found != fingerprint:
        raise ConfigError(
            f"evaluation.exports.{export.name}: {export.export_dir} sees through another vision tower ({found}) than "
            f"this configuration ({fingerprint}). Type clip.path and clip.feature_layer as it was trained with"
        )
