"""Copy a finished stage's model out as a stock LLaVA folder that transformers loads without our code.

With model.projector=pixel_shuffle or resampler, which LLaVA has not, only this project loads the folder.

python -m jobs.export mpo /tmp/my-vlm --verify
"""

import shutil
from pathlib import Path

import typer

from jobs.common import CONFIG, OVERRIDES, run_job
from minivlm.config import ConfigError, load_config
from minivlm.config.base import StageName
from minivlm.model.llava import PROJECTOR_NOTE
from minivlm.train.launch import finished_stage
from minivlm.workflow.ask import verify_with_test_pictures

STAGE = typer.Argument(..., help="Stage whose model is copied.")
TARGET = typer.Argument(..., help="New folder.")
VERIFY = typer.Option(
    False, "--verify", help="Ask test questions through plain transformers (where it can) and through this project."
)


def main(
    stage: StageName = STAGE,
    target: Path = TARGET,
    overrides: list[str] = OVERRIDES,
    config: Path = CONFIG,
    verify: bool = VERIFY,
) -> None:
    settings = load_config(config, overrides or [])
    if target.exists():
        raise ConfigError(f"{target} exists. Type a folder that does not, or remove it.")
    shutil.copytree(finished_stage(settings, stage).export_dir, target)
    if verify:
        print(verify_with_test_pictures(settings, target))
    if not settings.model.is_stock_llava:
        print(f"not for plain transformers: {PROJECTOR_NOTE}")
    print(f"model: {target}")


if __name__ == "__main__":
    run_job(main)
