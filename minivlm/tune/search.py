"""Search projector kind and learning rate with Ray Tune and ASHA; each trial trains one stage of a changed config.

Called by the tune job and the pipeline. All trials read one feature cache: no picture is encoded in a trial. Every
figure is of the validation split. Trials report through Tune, so that only the calling process writes to MLflow.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from minivlm import layout
from minivlm.config import Config, ConfigError
from minivlm.data.pipeline import prepare_features
from minivlm.log import Progress, get_logger
from minivlm.storage import content_hash, write_json
from minivlm.train.job import StageJob, planned_pictures
from minivlm.train.launch import RESULT_FILE, check_resources, make_job, run_stage
from minivlm.tune.space import Trial, best_overrides, trial_config, trial_overrides, trials
from minivlm.tune.trial import METRIC, run_trial

REDUCTION_FACTOR = 2
"""ASHA keeps the better half at each report."""

ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths of the user's data may be relative
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0: no tables on stdout
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}

log = get_logger(__name__)


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search; lies as result.json in `search_dir`."""

    best_overrides: list[str]
    """What the best trial found, to be added to a full run."""

    reproduce: list[str]
    """Everything in which the best trial differs from the config."""

    trials: list[dict[str, Any]]
    """The fields of `TrialRow`, one dict per trial."""

    best_val_loss: float


@dataclass
class TrialRow:
    """What is known of one trial."""

    name: str
    overrides: list[str]
    """Everything in which it differs from the config: they reproduce it exactly."""

    curve: list[tuple[int, float]]
    """(step, validation loss) of each report."""

    status: str = "running"
    """running | finished | stopped (by ASHA) | failed."""

    val_loss: float | None = None
    """The last one reported."""

    error: str | None = None


class _Recorder(tune.Callback):
    """Collects the trials' curves in the driver and passes each trial on as it ends."""

    def __init__(self, rows: list[TrialRow], jobs: Sequence[StageJob], on_trial: Callable[[TrialRow], None]) -> None:
        self.rows = rows
        self._results = [job.run_dir / RESULT_FILE for job in jobs]
        self._on_trial = on_trial

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        row = self.rows[trial.config["index"]]
        row.curve.append((int(result["step"]), float(result[METRIC])))
        row.val_loss = row.curve[-1][1]

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        index = trial.config["index"]
        self.rows[index].status = "finished" if self._results[index].exists() else "stopped"
        self._on_trial(self.rows[index])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        row = self.rows[trial.config["index"]]
        lines = str(trial.get_error() or "").strip().splitlines()
        row.status, row.error = "failed", lines[-1] if lines else "its process died"
        self._on_trial(row)


def search(config: Config, on_trial: Callable[[dict[str, Any]], None] | None = None) -> SearchResult:
    """Run the sweep that `config.tune` describes; a finished one returns at once.

    Needs an initialised Ray and prepared data. Trials that lose keep their curve (finished ones their export), not
    their training state.

    Args:
        on_trial: called in this process with each trial's row as it ends.

    Raises:
        ConfigError: no validation rows, or every trial failed.
        TrainingError: an input of the stage is missing.
    """
    config = config.model_copy(update={"storage_path": config.root})
    folder = search_dir(config)
    if (folder / RESULT_FILE).exists():
        log.info("the search is finished, nothing to do: %s", folder)
        return SearchResult(**json.loads((folder / RESULT_FILE).read_text()))
    settings = config.tune
    points = trials(
        settings.projectors,
        num_trials=settings.num_trials,
        min_learning_rate=settings.min_learning_rate,
        max_learning_rate=settings.max_learning_rate,
        seed=config.seed,
    )
    jobs = _jobs(config, points)
    with Progress(len(points), "tune trials") as progress:

        def ended(row: TrialRow) -> None:
            progress.update()
            log.info("%s %s: val_loss %s, %s", row.name, row.status, row.val_loss, " ".join(row.overrides))
            if on_trial is not None:
                on_trial(asdict(row))

        rows = [TrialRow(f"trial-{i}", trial_overrides(config, point), []) for i, point in enumerate(points)]
        _run(config, jobs, _Recorder(rows, jobs, ended))
    best, best_val_loss = best_trial(rows)
    result = SearchResult(
        best_overrides(config, points[best]), rows[best].overrides, [asdict(row) for row in rows], best_val_loss
    )
    for index, job in enumerate(jobs):
        if index != best:
            _drop_training_state(job.run_dir)
    write_json(folder / RESULT_FILE, asdict(result))
    return result


def search_dir(config: Config) -> Path:
    """Result and Tune's records of this search."""
    stage = config.tune.stage
    key = content_hash([layout.run_dir(config, stage).name, config.tune.model_dump(mode="json")])
    return config.root / "tune" / f"{stage}-{key}"


def _jobs(config: Config, points: Sequence[Trial]) -> list[StageJob]:
    """Everything that trials share is made here, once: tables, features and, for SFT, the stage before."""
    stage = config.tune.stage
    configs = [trial_config(config, point) for point in points]
    if stage == "sft":
        for changed in configs:  # one run per projector kind; the others find it finished
            run_stage(changed, "pretrain")
    check_resources(configs[0])
    jobs = [make_job(changed, stage) for changed in configs]
    if jobs[0].val_table is None:
        raise ConfigError(
            f"The {stage} stage has no validation rows, so trials cannot be compared: type data.val_fraction=0.05"
        )
    if config.data.features == "stream":  # a trial has no encoders: what any of them shows is encoded before
        shown = set().union(*(planned_pictures(job) for job in jobs))
        prepare_features(config, layout.tower_path(config), shown)
    return jobs


def _run(config: Config, jobs: list[StageJob], recorder: _Recorder) -> None:
    settings, train = config.tune, config.train
    os.environ.update(ENVIRONMENT)
    folder = search_dir(config)
    shutil.rmtree(folder / "ray", ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(run_trial, jobs=jobs), {"CPU": train.cpus_per_worker, "GPU": int(train.use_gpu)}
        ),
        param_space={"index": tune.grid_search(list(range(len(jobs))))},
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            max_concurrent_trials=settings.max_concurrent_trials,
            scheduler=_scheduler(settings.num_reports),
            reuse_actors=True,  # a start costs seconds, most of them imports
        ),
        run_config=tune.RunConfig(name="ray", storage_path=str(folder), verbose=0, callbacks=[recorder]),
    )
    tuner.fit()


def _scheduler(num_reports: int) -> ASHAScheduler | None:
    """ASHA over all reports but the last: a trial that came so far writes its result."""
    if num_reports == 1:
        return None
    return ASHAScheduler(
        max_t=num_reports - 1, grace_period=1, reduction_factor=REDUCTION_FACTOR, stop_last_trials=False
    )


def best_trial(rows: Sequence[TrialRow]) -> tuple[int, float]:
    """Index and value of the lowest last validation loss.

    Raises:
        ConfigError: no trial that did not fail has a finite one.
    """
    alive = {i: row.val_loss for i, row in enumerate(rows) if row.val_loss is not None and row.status != "failed"}
    losses = {i: loss for i, loss in alive.items() if math.isfinite(loss)}
    if not losses:
        raise ConfigError(f"Every trial failed, the first with: {rows[0].error}. Try tune.max_learning_rate=1e-3")
    best = min(losses, key=lambda index: losses[index])
    return best, losses[best]


def _drop_training_state(run_dir: Path) -> None:
    """Remove the optimizer shards of a trial that lost; its curve, result and export stay."""
    for engine in run_dir.glob("checkpoints/*/engine"):
        shutil.rmtree(engine, ignore_errors=True)
