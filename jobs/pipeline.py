"""The whole path: rows, tokenizer, CLIP, features, sweep, pretrain, SFT, preference pairs, MPO, evaluation, registry.

    ray job submit --working-dir . -- python -m jobs.pipeline --config configs/tiny.yaml train.sft.epochs=2

Typing the same command again continues where it was stopped; finished steps are not run twice.
"""

from pathlib import Path

import typer

from jobs.common import CONFIG, DRY_RUN, OVERRIDES, run_job
from minivlm.config import load_config
from minivlm.workflow.cluster import connect
from minivlm.workflow.dry_run import describe
from minivlm.workflow.pipeline import run_pipeline

SWEEP = typer.Option(True, help="Run the Ray Tune sweep.")
ASK = typer.Option(False, "--ask", help="Afterwards serve the champion, ask it one question over HTTP, and stop.")


def main(
    overrides: list[str] = OVERRIDES,
    config: Path = CONFIG,
    dry_run: bool = DRY_RUN,
    sweep: bool = SWEEP,
    ask: bool = ASK,
) -> None:
    settings = load_config(config, overrides or [])
    if dry_run:
        print(describe(settings))
        return
    connect(settings, trainers_first=True)
    run_pipeline(settings, sweep=sweep, ask=ask)


if __name__ == "__main__":
    run_job(main)
