"""Say what a source of data is: its formats, counts and lengths, its bad rows and why, and what one row teaches.

python -m jobs.inspect my/train.json --image-root my/pictures
python -m jobs.inspect hf://datasets/HuggingFaceM4/FineVision --subset chartqa --stage sft --preview
"""

import sys
from pathlib import Path

import typer

from jobs.common import CONFIG, run_job
from minivlm.config import load_config
from minivlm.workflow.inspection import inspect_source

DATA = typer.Argument(..., help="File, folder, pattern, catalogue or hf://datasets/OWNER/NAME.")
SETTINGS = typer.Argument(None, metavar="[KEY.PATH=VALUE]...", help="Settings that replace those of the file.")
STAGE = typer.Option("sft", help="What the rows would be used for: pretrain, sft, prompts or mpo.")
IMAGE_ROOT = typer.Option(None, help="Folder that picture names are relative to; default: the folder of each file.")
SUBSET = typer.Option(None, help="Entry of a catalogue, or folder of a hub data set.")
ROWS = typer.Option(1000, min=1, help="Rows looked at in each file.")
PREVIEW = typer.Option(False, "--preview", help="Draw the first pictures with coloured characters.")


def main(
    data: str = DATA,
    overrides: list[str] = SETTINGS,
    config: Path = CONFIG,
    stage: str = STAGE,
    image_root: Path | None = IMAGE_ROOT,
    subset: str | None = SUBSET,
    rows: int = ROWS,
    preview: bool = PREVIEW,
) -> None:
    if stage not in ("pretrain", "sft", "prompts", "mpo"):
        raise ValueError(f"No stage `{stage}`. Type one of: pretrain, sft, prompts, mpo")
    settings = load_config(config, overrides or [])
    lines = inspect_source(
        settings,
        data,
        stage=stage,
        image_root=image_root,
        subset=subset,
        max_rows=rows,
        preview=preview,
        colour=sys.stdout.isatty(),
    )
    print("\n".join(lines))


if __name__ == "__main__":
    run_job(main)
