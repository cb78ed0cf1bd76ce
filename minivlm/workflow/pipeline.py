"""The whole path as one command. Each step is done once; a killed run continues where it was."""

import time
from collections.abc import Callable
from typing import TypeVar

from minivlm import layout
from minivlm.config import STAGE_NAMES, Config
from minivlm.data.features import FeatureCache
from minivlm.tracking.client import check_tracking
from minivlm.tracking.runs import Run, start_run
from minivlm.train.launch import check_resources
from minivlm.workflow import steps
from minivlm.workflow.ask import ask_champion, check_port
from minivlm.workflow.register import register

T = TypeVar("T")


def run_pipeline(config: Config, *, sweep: bool, ask: bool) -> None:
    """Rows, tokenizer, CLIP, features, sweep, pretrain, SFT, pairs, MPO, evaluation, registry, and one question asked.

    Raises:
        ConfigError and its kin: one line that says what is wrong and what to type.
    """
    started = time.monotonic()
    check_tracking(config)
    check_resources(config, encoders_beside=config.data.features == "stream")
    if ask:
        check_port(config)
    with start_run(config, "pipeline") as run:
        _run_steps(config, run, sweep=sweep)
    if ask:
        _timed("serve", lambda: ask_champion(config), str)
    print(f"done in {time.monotonic() - started:.0f} s; everything is under {config.root}")
    print("Ask it yourself:   make serve   then open http://127.0.0.1:8000/")
    print(f"Look at the runs:  mlflow ui --backend-store-uri sqlite:///{layout.mlflow_dir(config)}/mlflow.db")


def _run_steps(config: Config, run: Run, *, sweep: bool) -> None:
    features = _timed("features", lambda: steps.prepare(config), _describe_features)
    if sweep:
        _timed("sweep", lambda: steps.sweep(config, run), lambda found: f"best: {' '.join(found.reproduce)}")
    for stage in STAGE_NAMES:
        if stage == "mpo":
            _timed("pairs", lambda: steps.build_preferences(config, run), str)
        _timed(
            stage,
            lambda stage=stage: steps.train(config, stage, run),  # type: ignore[misc]
            lambda result: f"{result.steps} steps, val_loss {result.val_loss}, {result.export_dir}",
        )
    evaluation = _timed("evaluate", lambda: steps.evaluate(config, run), lambda found: f"{found.report}\n{found.table}")
    run.log_artifact(evaluation.report)
    stat = features.stat()
    run.log_metrics({"features/distinct": stat.distinct, "features/encoded": stat.encoded})
    if config.data.features == "stream":
        print(f"[features] {_describe_features(features)}", flush=True)
    _timed("register", lambda: register(config, run), lambda result: result.table)


def _describe_features(cache: FeatureCache) -> str:
    stat = cache.stat()
    ratio = stat.distinct / max(stat.encoded, 1)
    return f"{stat.distinct} distinct pictures / {stat.encoded} encoded = {ratio:.2f}, {stat.num_bytes / 2**20:.0f} MiB"


def _timed(name: str, work: Callable[[], T], describe: Callable[[T], str]) -> T:
    started = time.monotonic()
    result = work()
    print(f"[{name}] {time.monotonic() - started:.1f} s: {describe(result)}", flush=True)
    return result
