"""The inference export of a finished training stage. Evaluation and preference sampling start here."""

import json
from dataclasses import dataclass
from pathlib import Path

from minivlm.config import Config, StageName
from minivlm.layout import run_dir
from minivlm.storage import file_sha256


@dataclass(frozen=True)
class StageExport:
    """Last checkpoint of a stage. `reference` = first 16 hex digits of its manifest's sha256, hence of every weight."""

    stage: StageName
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
    return StageExport(stage, checkpoint_dir, export_dir, file_sha256(manifest)[:16])
