"""Which checkpoint a run started from: a run never goes on, nor counts as done, for another one.

The name of a run's folder hashes settings, not weights. Where an earlier stage was trained again (its checkpoint was
deleted, say), the later one would otherwise mix weights of two origins. Called by `minivlm.train.launch`.
"""

import json

from minivlm.config import Config, StageName
from minivlm.inference.exports import policy_export, stage_export
from minivlm.layout import run_dir
from minivlm.storage import write_json
from minivlm.train.stages import STAGES, TrainingError

ORIGIN_FILE = "origin.json"


def check_origin(config: Config, stage: StageName) -> None:
    """Refuse a run that started from another checkpoint than the stage before it has now.

    A run without a record, or whose origin is gone, is taken as it is.

    Raises:
        TrainingError: it did, or its record cannot be read.
    """
    folder, reference = run_dir(config, stage), _reference(config, stage)
    path = folder / ORIGIN_FILE
    if reference is None or not path.exists():
        return
    try:
        found = json.loads(path.read_text())["reference"]
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} cannot be read ({error!r}): delete {folder} and type the same command") from None
    if found != reference:
        raise TrainingError(
            f"{folder} was trained from checkpoint {found}, but the stage before it is now {reference}: "
            f"delete {folder} and type the same command"
        )


def write_origin(config: Config, stage: StageName) -> None:
    """Record what a run starts from."""
    reference = _reference(config, stage)
    if reference is not None:
        write_json(run_dir(config, stage) / ORIGIN_FILE, {"reference": reference})


def _reference(config: Config, stage: StageName) -> str | None:
    previous = STAGES[stage].previous
    try:
        if stage == "mpo":
            return policy_export(config).reference
        return stage_export(config, previous).reference if previous else None
    except FileNotFoundError:
        return None
