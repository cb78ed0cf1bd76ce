"""Run one training stage on the cluster: once, and from its newest checkpoint where an earlier attempt stopped.

    result = run_stage(config, "sft")        # what `python -m jobs.train sft` calls

Ray Train runs `minivlm.train.loop` in the workers; Ray Data feeds them the plan's micro-batches. Our own manifests
decide where to continue, so Ray's record of an earlier attempt is removed before a new one.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import ray
import ray.train
from ray.data import Dataset, ExecutionOptions
from ray.train import (
    CheckpointConfig,
    DataConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer

from minivlm import layout
from minivlm.config import Config, ConfigError, StageName
from minivlm.data.pipeline import build_tokens, encoding, prepare_features
from minivlm.data.settings import tower_shape
from minivlm.data.tokenizer import load_tokenizer
from minivlm.data.tokens import TokenTable
from minivlm.inference.exports import check_reference, policy_export
from minivlm.log import get_logger
from minivlm.model.checkpoint import MANIFEST, newest_complete
from minivlm.schema import IMAGE_PLACEHOLDER
from minivlm.storage import write_json
from minivlm.train.environment import worker_environment
from minivlm.train.feed import newest_step, stage_dataset, stage_worker
from minivlm.train.job import StageJob, count_steps, sampled_pictures, whitening_pictures
from minivlm.train.metrics import METRICS_FILE, ProgressFollower
from minivlm.train.origin import check_origin, write_origin
from minivlm.train.placement import check_placement
from minivlm.train.stages import STAGES, TrainingError

RESULT_FILE = "result.json"
RAY_RECORDS = ("checkpoint_manager_snapshot.json", ".validate_storage_marker")
REPORT_INTERVAL_S = "0.5"
"""How often the controller collects reports; a report blocks training until it is collected."""

log = get_logger(__name__)


@dataclass(frozen=True)
class StageResult:
    """A finished stage."""

    stage: StageName
    run_dir: Path
    checkpoint_dir: Path
    export_dir: Path
    """Inference export of the last checkpoint."""

    steps: int
    val_loss: float | None
    """None where the stage has no validation rows."""

    metrics: dict[str, float]
    """Last line of the curve."""


def run_stage(config: Config, stage: StageName) -> StageResult:
    """Train a stage to its end; a finished one returns at once, an interrupted one continues.

    Needs an initialised Ray. The same command gives the same weights, interrupted or not.

    Raises:
        ConfigError: unknown stage, or a placement that this cluster can never schedule.
        TrainingError: a missing earlier stage or pairs, a loss that is not finite, workers that died too often.
    """
    if stage not in STAGES:
        raise ConfigError(f"No stage `{stage}`. Type one of: {', '.join(get_args(StageName))}")
    run_dir = layout.run_dir(config, stage)
    if (run_dir / RESULT_FILE).exists():
        check_origin(config, stage)
        log.info("%s is finished, nothing to do: %s", stage, run_dir)
        return finished_stage(config, stage)
    check_resources(config, encoders_beside=config.data.features == "stream")
    job = make_job(config, stage)
    check_origin(config, stage)
    write_origin(config, stage)
    first_step = newest_step(job.run_dir)
    if first_step < job.total_steps:
        if first_step:
            log.info("%s continues after step %d of %d: %s", job.stage, first_step, job.total_steps, job.run_dir)
        train_on_cluster(job, first_step)
    return finish(job)


def finished_stage(config: Config, stage: StageName) -> StageResult:
    """Result of a stage that was trained before.

    Raises:
        TrainingError: it was not, under this configuration, or its checkpoint is gone.
    """
    path = layout.run_dir(config, stage) / RESULT_FILE
    if not path.exists():
        raise TrainingError(
            f"No finished {stage} run under {path.parent}. "
            f"With the same --config and overrides, run: {STAGES[stage].command}"
        )
    values = json.loads(path.read_text())
    folders = {name: Path(values[name]) for name in ("run_dir", "checkpoint_dir", "export_dir")}
    if not folders["export_dir"].is_dir():
        raise TrainingError(
            f"{path} names the checkpoint {folders['checkpoint_dir']}, which is gone. "
            f"Delete {path} and run: {STAGES[stage].command}"
        )
    return StageResult(**{**values, **folders})


def check_resources(config: Config, *, encoders_beside: bool = False) -> None:
    """`check_placement` on this cluster: refuses what would wait for ever."""
    available = ray.cluster_resources()
    check_placement(
        config, cpus=available.get("CPU", 0.0), gpus=available.get("GPU", 0.0), encoders_beside=encoders_beside
    )


def make_job(config: Config, stage: StageName) -> StageJob:
    """Resolve everything that the stage reads, making what is missing and cheap.

    Raises:
        TrainingError: the previous stage, the preference pairs or the vision tower are not there.
    """
    initial_export = _initial_export(config, stage)
    tower_path = layout.tower_path(config)
    if config.clip.path is None and not Path(tower_path).is_dir():
        raise TrainingError(f"No vision tower under {tower_path}. Run: python -m jobs.clip")
    tokenizer_path = layout.tokenizer_path(config)
    tokenizer = load_tokenizer(tokenizer_path)
    train_table, val_table = _tables(config, stage)
    sample_table = val_table
    if stage == "mpo" and config.train.sample_every_steps:
        sample_table = build_tokens(config, "sft", "val")
    directly = _read_directly(config, train_table, val_table, initial_export)
    features = prepare_features(config, tower_path, directly | sampled_pictures(config, stage, sample_table))
    streams = config.data.features == "stream" and features.missing(TokenTable.open(train_table).digests)
    num_units = len(TokenTable.open(train_table)) // STAGES[stage].group_size
    if not num_units:
        raise TrainingError(f"{stage} has no training rows. Look at data.{stage} and run: python -m jobs.prepare")
    return StageJob(
        config=config,
        stage=stage,
        run_dir=layout.run_dir(config, stage),
        train_table=train_table,
        val_table=val_table,
        sample_table=sample_table,
        features_dir=features.directory,
        encoding=encoding(config, tower_path, features) if streams else None,
        num_features=features.shape[0],
        vision_size=features.shape[1],
        tokenizer_path=tokenizer_path,
        tower_path=tower_path,
        image_token_id=int(tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)),
        pad_token_id=int(tokenizer.pad_token_id),
        vocab_size=len(tokenizer),
        initial_export=initial_export,
        total_steps=count_steps(num_units, getattr(config.train, stage)),
    )


def _initial_export(config: Config, stage: StageName) -> Path | None:
    """What the stage starts from: the previous one's export, in a further round of MPO that of preferences.policy."""
    previous = STAGES[stage].previous
    if stage == "mpo" and config.preferences.policy is not None:
        return policy_export(config).export_dir
    return finished_stage(config, previous).export_dir if previous else None


def _tables(config: Config, stage: StageName) -> tuple[Path, Path | None]:
    if stage != "mpo":
        val_table = build_tokens(config, stage, "val")
        return build_tokens(config, stage, "train"), val_table if len(TokenTable.open(val_table)) else None
    table = layout.pairs_dir(config) / "tokens"
    if not table.is_dir():
        raise TrainingError(
            f"No preference pairs with reference log-probabilities under {table}. Run: python -m jobs.preferences"
        )
    check_reference(table.parent, policy_export(config))
    return table, None


def _read_directly(config: Config, train_table: Path, val_table: Path | None, initial_export: Path | None) -> set[str]:
    """Pictures whose features a stage reads besides its batches: for validation, and to fit a new projector."""
    digests = set(TokenTable.open(val_table).digests) if val_table else set()
    if initial_export is None:
        digests.update(whitening_pictures(train_table, tower_shape(config)[0]))
    return digests


def train_on_cluster(job: StageJob, first_step: int) -> None:
    """The steps of a stage from `first_step` on, by Ray Train; needs an initialised Ray.

    Raises:
        TrainingError: a loss that is not finite, or workers that died too often.
    """
    train = job.config.train
    job.run_dir.mkdir(parents=True, exist_ok=True)
    for name in RAY_RECORDS:
        (job.run_dir / name).unlink(missing_ok=True)
    run_config = RunConfig(
        name=job.run_dir.name,
        storage_path=str(job.run_dir.parent),
        failure_config=FailureConfig(max_failures=train.max_failures),
        checkpoint_config=CheckpointConfig(),
        worker_runtime_env={"env_vars": worker_environment(job.config)},
    )
    trainer = torch_trainer(job.config, stage_worker, job, partial(stage_dataset, job), run_config)
    curve = job.run_dir / METRICS_FILE
    with ProgressFollower(curve, first_step=first_step, total_steps=job.total_steps, label=job.stage):
        try:
            outcome: dict[str, Any] = trainer.fit().return_value or {}
        except TrainingFailedError as error:
            raise TrainingError(_explain(job, error)) from error
    if "error" in outcome:
        raise TrainingError(outcome["error"])


def torch_trainer(
    config: Config, worker: Callable[..., Any], job: Any, dataset: Callable[[], Dataset], run_config: RunConfig
) -> TorchTrainer:
    """Ray Train as stages and the clip job use it: the dataset's blocks go round the workers in their order."""
    train = config.train
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", REPORT_INTERVAL_S)  # Ray hands it to the controller
    return TorchTrainer(
        worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=train.use_gpu,
            resources_per_worker={"CPU": train.cpus_per_worker, **({"GPU": 1} if train.use_gpu else {})},
        ),
        run_config=run_config,
        datasets={"train": dataset},
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True), enable_shard_locality=False),
    )


def _explain(job: StageJob, error: TrainingFailedError) -> str:
    """One line for people; Ray has printed the workers' tracebacks."""
    reason = str(error).strip().splitlines()[-1]
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        rank, failure = min(error.worker_failures.items())
        lines = str(failure).strip().splitlines() or [type(failure).__name__]
        reason = f"worker {rank}: {lines[-1]}"
    step = newest_step(job.run_dir)
    kept = f"{step} of {job.total_steps} steps are kept"
    return f"{job.stage} stopped: {reason}. {kept}; type the same command to continue"


def finish(job: StageJob) -> StageResult:
    """Write result.json from the last checkpoint's manifest.

    Raises:
        TrainingError: there is none.
    """
    checkpoint = newest_complete(job.run_dir)
    if checkpoint is None:
        raise TrainingError(
            f"{job.stage} ended without a checkpoint under {job.run_dir}. Run it again: {STAGES[job.stage].command}"
        )
    metrics = json.loads((checkpoint / MANIFEST).read_text())["metrics"]
    result = StageResult(
        stage=job.stage,
        run_dir=job.run_dir,
        checkpoint_dir=checkpoint,
        export_dir=checkpoint / "export",
        steps=job.total_steps,
        val_loss=metrics.get("val/loss"),
        metrics=metrics,
    )
    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(result).items()}
    write_json(job.run_dir / RESULT_FILE, values)
    return result
