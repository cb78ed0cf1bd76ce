"""One function per step of the path: does the work once, tracks it in MLflow, says where the result is.

Every step is idempotent (its result lies under a name that hashes all that determines it) and makes what it needs
that is cheap to find again; a missing *model* of an earlier stage is an error that names the command.
"""

from dataclasses import dataclass
from pathlib import Path

from minivlm import layout
from minivlm.config import STAGE_NAMES, Config, StageName
from minivlm.data.features import FeatureCache
from minivlm.data.pipeline import draw_rows, drawn_stages, prepare_features, prepare_samples, prepare_tokenizer
from minivlm.evaluation.report import write_report
from minivlm.evaluation.results import read_results
from minivlm.evaluation.runner import evaluate_exports
from minivlm.inference.exports import folder_export, stage_export
from minivlm.preferences.card import CARD_FILE, pairs_metrics
from minivlm.preferences.reference import add_reference_logps
from minivlm.preferences.sampling import build_pairs
from minivlm.tracking.card import result_metrics
from minivlm.tracking.client import check_tracking
from minivlm.tracking.runs import Run, start_run
from minivlm.tracking.sweep import log_search
from minivlm.train.contrastive import train_clip
from minivlm.train.launch import RESULT_FILE, StageResult, run_stage
from minivlm.train.metrics import METRICS_FILE, SAMPLES_FILE, read_metrics
from minivlm.tune.search import SearchResult, search
from minivlm.workflow.tables import results_table, sample_rows


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation produced: a table for the terminal and the HTML report."""

    table: str
    report: Path


def prepare_tower(config: Config) -> str:
    """Validated rows, tokenizer and vision tower; returns the tower's folder or hub id."""
    prepare_samples(config)
    prepare_tokenizer(config)
    if config.clip.path is None:
        train_clip(config)
    return layout.tower_path(config)


def prepare(config: Config) -> FeatureCache:
    """All that training reads but its tokens; returns the filled feature cache."""
    tower = prepare_tower(config)
    for stage in drawn_stages(config):
        draw_rows(config, stage)
    return prepare_features(config, tower)


def sweep(config: Config, parent: Run | None = None) -> SearchResult:
    """Search projector and learning rate on the validation split; every trial is a nested run."""
    check_tracking(config)
    prepare(config)
    with start_run(config, "sweep", parent=parent) as run:
        result = search(config)
        log_search(config, result.trials, result.best_overrides, result.best_val_loss, run)
    return result


def train(config: Config, stage: StageName, parent: Run | None = None) -> StageResult:
    """One training stage, its curves followed into MLflow while it runs; sample generations, if any, at its end."""
    check_tracking(config)
    prepare(config)
    run_dir = layout.run_dir(config, stage)
    with start_run(config, stage, key=run_dir.name, parent=parent) as run, run.follow(run_dir / METRICS_FILE):
        result = run_stage(config, stage)
        if samples := read_metrics(run_dir / SAMPLES_FILE):
            run.log_panel("samples", samples)
        return result


def build_preferences(config: Config, parent: Run | None = None) -> Path:
    """Preference pairs from a model's own answers (or the user's MMPR rows) with reference log-probabilities; counts
    and card go to MLflow."""
    check_tracking(config)
    prepare(config)
    folder = build_pairs(config)
    tokens = add_reference_logps(config)
    with start_run(config, "preferences", key=folder.name, parent=parent) as run:
        run.log_metrics(pairs_metrics(folder))
        run.log_artifact(folder / CARD_FILE)
    return tokens


def finished_stages(config: Config) -> list[StageName]:
    """Stages whose run has a result, in order.

    Raises:
        FileNotFoundError: none has.
    """
    done = _finished(config)
    if not done:
        raise FileNotFoundError("No finished stage with these settings. Run: python -m jobs.train pretrain")
    return done


def _finished(config: Config) -> list[StageName]:
    return [stage for stage in STAGE_NAMES if (layout.run_dir(config, stage) / RESULT_FILE).exists()]


def evaluate(config: Config, parent: Run | None = None) -> Evaluation:
    """Answer the test questions with every finished stage's model, then with those of evaluation.exports.

    Metrics, sample panels and report go to MLflow. Without a finished stage the exports are enough.
    """
    check_tracking(config)
    further = [folder_export(name, folder) for name, folder in config.evaluation.exports.items()]
    stages = finished_stages(config) if not further else _finished(config)
    folders = evaluate_exports(config, [*(stage_export(config, stage) for stage in stages), *further])
    results = [read_results(folder) for folder in folders]
    report = write_report(config, folders, folders[-1] / "report.html")
    with start_run(config, "evaluation", key=folders[-1].name, parent=parent) as run:
        for step, result in enumerate(results):
            run.log_metrics(result_metrics(result), step=step)
        run.log_panel("samples", sample_rows(config, folders))
        run.log_artifact(report)
    return Evaluation(results_table(results), report)
