"""Run one training stage: pretrain, sft or mpo. A finished stage is not run twice; a killed one continues.

ray job submit --working-dir . -- python -m jobs.train sft --config configs/tiny.yaml train.sft.epochs=2
"""

from pathlib import Path

import typer

from jobs.common import CONFIG, DRY_RUN, OVERRIDES, run_job
from minivlm.config import load_config
from minivlm.config.base import StageName
from minivlm.workflow.cluster import connect
from minivlm.workflow.dry_run import describe
from minivlm.workflow.steps import train

STAGE = typer.Argument(..., help="Stage to run.")


def main(
    stage: StageName = STAGE, overrides: list[str] = OVERRIDES, config: Path = CONFIG, dry_run: bool = DRY_RUN
) -> None:
    settings = load_config(config, overrides or [])
    if dry_run:
        print(describe(settings))
        return
    connect(settings, trainers_first=True)
    result = train(settings, stage)
    print(f"{stage}: val_loss {result.val_loss}, {result.steps} steps, model {result.export_dir}")


if __name__ == "__main__":
    run_job(main)
