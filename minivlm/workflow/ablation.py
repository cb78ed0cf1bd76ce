"""Which terms of the preference loss help, and do chains of thought: one SFT model and its pairs under other weights.

    run_ablation(PATH, overrides, seeds=[0, 1, 2], second_round=True)        # what `python -m jobs.ablation` calls

Per seed one whole path (data, tokenizer, CLIP, pretrain, SFT, pairs), then one MPO stage per line of `METHODS` and, on
demand, another on pairs that the model after MPO answered. All are evaluated in one job on the test split. Every step
is idempotent, so a killed ablation goes on where it was, and a further seed adds only its own work.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from minivlm import layout
from minivlm.config import Config, ConfigError, load_config
from minivlm.evaluation.report import write_report
from minivlm.evaluation.results import read_results, read_rows
from minivlm.evaluation.runner import evaluate_exports
from minivlm.inference.exports import StageExport, stage_export
from minivlm.model.tokenizer import encode_text, load_tokenizer
from minivlm.scoring.ablation import REASONING, Evaluated, compare_methods, describe_table
from minivlm.storage import content_hash, write_bytes, write_json
from minivlm.tracking.client import check_tracking
from minivlm.tracking.runs import start_run
from minivlm.workflow.steps import build_preferences, train

BASELINE = "SFT"
METHODS: dict[str, tuple[float, float, float]] = {
    "SFT on chosen": (0.0, 0.0, 1.0),
    "DPO": (1.0, 0.0, 0.0),
    "BCO": (0.0, 1.0, 0.0),
    "DPO+SFT": (1.0, 0.0, 1.0),
    "MPO": (0.8, 0.2, 1.0),
}
"""Weights of L_p, L_q, L_g (arXiv:2411.10442, Sec. 4): MPO's as published, the others switch terms off."""

SECOND_ROUND = "MPO, second round"
VARIANTS = "evaluation.variants=[direct]"
"""Every question as it is, and the reasoning ones also without their chain of thought."""


@dataclass(frozen=True)
class Ablation:
    """What was found: the table as Markdown, the folder with it, and the report of each seed."""

    table: str
    directory: Path
    reports: tuple[Path, ...]


def method_overrides(name: str) -> list[str]:
    """Settings that make the MPO stage the method `name` of `METHODS`."""
    keys = ("dpo_weight", "bco_weight", "sft_weight")
    return [f"train.mpo.{key}={weight}" for key, weight in zip(keys, METHODS[name], strict=True)]


def describe_plan(seeds: Sequence[int], second_round: bool) -> str:
    """What `run_ablation` would train, in words."""
    methods = [*METHODS, SECOND_ROUND] if second_round else [*METHODS]
    lines = [
        f"{name}: weights of L_p, L_q, L_g {' '.join(map(str, METHODS.get(name, METHODS['MPO'])))}" for name in methods
    ]
    return "\n".join(
        ["", "# ablation", f"seeds {', '.join(map(str, seeds))}, each: pretrain, sft, pairs, then", *lines]
    )


def check_plan(path: Path, overrides: list[str], seeds: Sequence[int]) -> Config:
    """The settings, where an ablation of them can be made.

    Raises:
        ConfigError: no seed, a seed twice, data or a start of one's own, or no direct answers to compare with.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"an ablation needs different seeds, not {list(seeds)}: type --seed 0 --seed 1")
    config = load_config(path, overrides)
    if not config.uses_miniworld or config.preferences.policy is not None:
        raise ConfigError(
            "the ablation's table has the miniworld's tasks, and its methods start from SFT: "
            "remove data.pretrain, data.sft, data.prompts, data.mpo and preferences.policy"
        )
    if not config.miniworld.direct_reasoning_fraction:
        raise ConfigError(
            "direct answers to reasoning questions are compared, but none is taught: "
            "add miniworld.direct_reasoning_fraction=1"
        )
    return config


def run_ablation(path: Path, overrides: list[str], *, seeds: Sequence[int], second_round: bool) -> Ablation:
    """Train and evaluate every method for every seed.

    Args:
        path: settings, as for the pipeline; `miniworld.direct_reasoning_fraction` must be above 0, or the model never
            learned to answer a reasoning question directly.
        overrides: settings that replace those of the file.
        seeds: values of `seed`; each is a data set, a tokenizer, a CLIP and an SFT model of its own.
        second_round: whether MPO is done a second time, on answers of the model after the first.

    Raises:
        ConfigError: as `check_plan`.
    """
    config = check_plan(path, overrides, seeds)
    check_tracking(config)
    found: dict[str, list[Evaluated]] = {}
    reports = []
    for seed in seeds:
        folders = _one_seed(path, [*overrides, f"seed={seed}"], second_round)
        tokenizer = load_tokenizer(layout.tokenizer_path(load_config(path, [*overrides, f"seed={seed}"])))
        for name, folder in folders.items():
            found.setdefault(name, []).append(_read(folder, tokenizer))
        reports.append(write_report(config, list(folders.values()), next(iter(folders.values())) / "ablation.html"))
    lines = compare_methods(found, baseline=BASELINE)
    directory = config.root / "ablations" / content_hash([config.model_dump(mode="json"), list(seeds), second_round])
    table = describe_table(lines)
    write_bytes(directory / "table.md", table.encode())
    write_json(directory / "table.json", [asdict(line) for line in lines])
    with start_run(config, "ablation", key=directory.name) as run:
        run.log_artifact(directory / "table.md")
        for seed, report in zip(seeds, reports, strict=True):
            run.log_artifact(report, f"seed-{seed}")
    return Ablation(table, directory, tuple(reports))


def _one_seed(path: Path, overrides: list[str], second_round: bool) -> dict[str, Path]:
    """Evaluation folder of each method."""
    base = load_config(path, overrides)
    train(base, "pretrain")
    train(base, "sft")
    build_preferences(base)
    exports = {BASELINE: stage_export(base, "sft")}
    for name in METHODS:
        exports[name] = _train_mpo(load_config(path, [*overrides, *method_overrides(name)]))
    if second_round:
        again = [*overrides, *method_overrides("MPO"), f"preferences.policy={exports['MPO'].export_dir}"]
        config = load_config(path, again)
        build_preferences(config)
        exports[SECOND_ROUND] = _train_mpo(config)
    named = [replace(export, name=name) for name, export in exports.items()]
    folders = evaluate_exports(load_config(path, [*overrides, VARIANTS]), named)
    return dict(zip(exports, folders, strict=True))


def _train_mpo(config: Config) -> StageExport:
    train(config, "mpo")
    return stage_export(config, "mpo")


def _read(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Evaluated:
    rows = read_rows(folder)
    lengths = [len(encode_text(tokenizer, row["answer"])) for row in rows if row["task"] == REASONING]
    return Evaluated(rows, read_results(folder), sum(lengths) / len(lengths))
