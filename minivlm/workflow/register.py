"""Register a model and let it serve if it passes every gate. Called by the register job and at the end of the pipeline.

Registrations under one storage_path go one after another, so a champion is always compared with the one that it
replaces. A refused version waits as `@challenger`; its card says what each gate measured.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivlm import layout
from minivlm.config import Config, ConfigError
from minivlm.evaluation.gate import Check, check_better, check_complete, examine
from minivlm.evaluation.results import read_results, read_rows
from minivlm.evaluation.runner import evaluate_exports
from minivlm.inference.exports import folder_export, stage_export
from minivlm.log import get_logger
from minivlm.storage import file_sha256
from minivlm.tracking.card import gate_section, model_card, result_metrics
from minivlm.tracking.client import TrackingError, check_tracking, one_line
from minivlm.tracking.registry import (
    GATE_METRIC,
    ChampionVersion,
    champion_number,
    download_version,
    find_evaluation,
    free_challenger,
    keep_evaluation,
    make_champion,
    promotion_lock,
    register_candidate,
    resolve_champion,
    version_digest,
    write_card,
)
from minivlm.tracking.runs import Run, start_run
from minivlm.workflow.cluster import connect, is_connected
from minivlm.workflow.steps import finished_stages

log = get_logger(__name__)

STORE_CHAMPION = (
    "If it is damaged or gone, store it anew: python -m jobs.register with the settings that made it, while its "
    "checkpoint is there"
)
OTHER_CHAMPION = "Else move @champion to a whole version in MLflow, or delete that alias to let the next one serve"


@dataclass(frozen=True)
class Candidate:
    """What may become the champion: an export, its evaluation, and its card so far."""

    export_dir: Path
    evaluation: Path
    card: str


@dataclass(frozen=True)
class PromotionResult:
    """What the gates decided. `champion` is the version that serves now, None where there is none."""

    promoted: bool
    reason: str
    version: int
    champion: int | None
    checks: tuple[Check, ...] = ()

    @property
    def table(self) -> str:
        """A line for each gate, then the decision and what to type."""
        words = {True: "passed", False: "REFUSED", None: "-"}
        lines = [f"{check.gate:<10}{words[check.passed]:<9}{check.measured}" for check in self.checks]
        return "\n".join([*lines, self.reason])


def register(config: Config, parent: Run | None = None) -> PromotionResult:
    """Register the last stage's model with its card; `@champion` moves only through the gates.

    Raises:
        FileNotFoundError: no finished stage, or one that was not evaluated.
        TrackingError: MLflow is out of reach.
    """
    check_tracking(config)
    stages = finished_stages(config)
    exports = [stage_export(config, stage) for stage in stages]
    folders = [layout.evaluation_dir(config, export.name, export.reference) for export in exports]
    candidate = Candidate(
        exports[-1].export_dir,
        folders[-1],
        model_card(config, [read_results(folder) for folder in folders]),
    )
    key = layout.run_dir(config, stages[-1]).name
    with start_run(config, "register", key=key, parent=parent) as run:
        return submit(config, candidate, run)


def submit(config: Config, candidate: Candidate, run: Run) -> PromotionResult:
    """Make `candidate` a version of the run, put it through the gates, and move `@champion` if it passes them all."""
    results = read_results(candidate.evaluation)
    metrics, questions = result_metrics(results), str(results["questions"])
    with promotion_lock(config):
        version = register_candidate(config, candidate.export_dir, metrics, candidate.card, run, questions=questions)
        keep_evaluation(config, version, questions, candidate.evaluation)
        while True:
            champion = champion_number(config)
            if champion == version:
                free_challenger(config, version)
                return _reexamined(config, version)
            checks = _checks(config, version, champion, candidate, metrics, questions)
            refused = [check for check in checks if check.passed is False]
            rows = [(check.gate, check.passed, check.measured) for check in checks]
            gate = refused[0].gate if refused else "passed"
            write_card(config, version, candidate.card + gate_section(rows, version, gate), gate)
            if refused:
                return _refusal(version, champion, checks, refused[0])
            if make_champion(config, version, instead_of=champion):
                break
            log.info("@champion moved while version %d was examined: comparing it with the new one", version)
    better = f"better than version {champion}" if champion is not None else "the first champion"
    reason = f"version {version} is @champion: {GATE_METRIC} {metrics[GATE_METRIC]:.4f}, {better}"
    return PromotionResult(True, reason, version, version, tuple(checks))


def _reexamined(config: Config, version: int) -> PromotionResult:
    """Whether the champion, which was registered again, is whole as it is stored."""
    with tempfile.TemporaryDirectory(dir=config.root, prefix=".gate-") as place:
        stored = Path(place) / "version"
        stored.mkdir()
        download_version(config, version, stored)
        check = check_complete(stored, version_digest(config, version))
    if not check.passed:
        reason = f"version {version} is the champion, and damaged in the registry: {check.measured}. {OTHER_CHAMPION}"
        return PromotionResult(False, reason, version, version, (check,))
    return PromotionResult(True, f"version {version} is the champion already", version, version, (check,))


def _refusal(version: int, champion: int | None, checks: Sequence[Check], first: Check) -> PromotionResult:
    kept = f"version {champion} stays @champion" if champion is not None else "there is no @champion"
    reason = (
        f"version {version} is refused by gate `{first.gate}`: {first.measured}. {first.advice}. "
        f"It waits as @challenger, {kept}"
    )
    return PromotionResult(False, reason, version, champion, tuple(checks))


def _checks(
    config: Config,
    version: int,
    champion: int | None,
    candidate: Candidate,
    metrics: Mapping[str, float],
    questions: str,
) -> list[Check]:
    """Every gate on the version as it is stored."""
    rows = read_rows(candidate.evaluation)
    with tempfile.TemporaryDirectory(dir=config.root, prefix=".gate-") as place:
        stored = Path(place) / "version"
        stored.mkdir()
        download_version(config, version, stored)
        checks = examine(stored, version_digest(config, version), candidate.export_dir, metrics, rows)
        if not all(check.passed for check in checks):
            return [*checks, Check("better", None, "not looked at")]
        if champion is None:
            return [*checks, Check("better", True, "there is no champion to beat")]
        tokenizer = file_sha256(stored / "tokenizer.json")
    try:
        serving = resolve_champion(config)
    except TrackingError as error:
        measured = f"champion {champion} cannot be compared with: {one_line(error)}"
        return [*checks, Check("better", False, measured, f"{STORE_CHAMPION}. {OTHER_CHAMPION}")]
    champion_rows = _champion_rows(config, serving, questions)
    if isinstance(champion_rows, Check):
        return [*checks, champion_rows]
    tokenizers = (tokenizer, file_sha256(serving.path / "tokenizer.json"))
    return [*checks, check_better(rows, champion_rows, serving.version, tokenizers)]


def _champion_rows(config: Config, serving: ChampionVersion, questions: str) -> list[dict[str, Any]] | Check:
    """The champion's answers to these questions: those kept with it, else it is asked now, on a cluster.

    A `Check` says why it cannot be asked under this configuration.
    """
    with tempfile.TemporaryDirectory(dir=config.root, prefix=".gate-") as place:
        if find_evaluation(config, serving.version, questions, Path(place)):
            return read_rows(Path(place))
    log.info("champion %d was not asked these questions (%s): asking it now", serving.version, questions)
    if not is_connected():
        connect(config)
    try:
        [folder] = evaluate_exports(config, [folder_export(f"champion-{serving.version}", serving.path)])
    except ConfigError as error:
        measured = f"champion {serving.version} cannot be asked these questions: {error}"
        return Check("better", False, measured, "To serve the new one without a comparison, move @champion in MLflow")
    asked = str(read_results(folder)["questions"])
    if asked != questions:
        measured = f"its questions ({questions}) are not those of these settings ({asked})"
        return Check("better", False, measured, "Run python -m jobs.evaluate and this command with the same settings")
    keep_evaluation(config, serving.version, questions, folder)
    return read_rows(folder)
