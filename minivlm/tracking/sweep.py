"""A search's trials as nested MLflow runs. Takes plain data, so that it knows nothing of Ray Tune."""

from collections.abc import Mapping, Sequence
from typing import Any

from minivlm.config import Config
from minivlm.tracking.runs import Run, flatten, start_run


def log_trial(config: Config, trial: Mapping[str, Any], parent: Run) -> None:
    """One finished or stopped trial below the sweep's run; a repeated call changes nothing.

    Args:
        trial: `name`, `status`, `overrides` (list of key=value), `curve` (list of [step, val_loss]), `val_loss`.
    """
    name = str(trial["name"])
    overrides = list(trial["overrides"])
    params = flatten(config) | dict(override.split("=", 1) for override in overrides)
    tags = {"trial_status": trial["status"], "overrides": " ".join(overrides)}
    with start_run(config, name, key=name, parent=parent, tags=tags, params=params) as run:
        for step, val_loss in trial["curve"]:
            run.log_metrics({"val/loss": val_loss}, step=int(step))


def log_search(
    config: Config,
    trials: Sequence[Mapping[str, Any]],
    best_overrides: Sequence[str],
    best_val_loss: float,
    parent: Run,
) -> None:
    """All trials of a search as runs below `parent`, and the best one on `parent` itself with a table of all."""
    for trial in trials:
        log_trial(config, trial, parent)
    parent.log_tags({"best_overrides": " ".join(best_overrides)})
    parent.log_metrics({"best/val_loss": best_val_loss})
    rows = [
        {key: trial[key] for key in ("name", "status", "val_loss")} | {"overrides": " ".join(trial["overrides"])}
        for trial in trials
    ]
    parent.log_panel("trials", rows)
