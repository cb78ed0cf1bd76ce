"""Measure the CLIP tower: image-text recall@k both ways, and zero-shot classification with prompt templates.

python -m jobs.retrieval --config configs/tiny.yaml

python -m jobs.retrieval --captions captions_val2014.json --image-root val2014 clip.path=openai/clip-vit-base-patch32

python -m jobs.retrieval --captions dataset_coco.json --image-root coco clip.path=/models/my-clip --dry-run

python -m jobs.retrieval --classes my/birds --template "a photo of a {}, a bird." --template "a drawing of a {}."

Without a file or folder: captions of the test split, and with the embedded data set drawn pictures of one shape.
"""

from pathlib import Path

import typer

from jobs.common import CONFIG, OVERRIDES, run_job
from minivlm.config import load_config
from minivlm.workflow.cluster import connect
from minivlm.workflow.retrieval import Asked, describe, measure

CAPTIONS = typer.Option(None, help="Captions file of COCO, or of Karpathy's splits (their test split counts).")
IMAGE_ROOT = typer.Option(None, help="Folder that picture names are relative to; default: the folder of the file.")
CLASSES = typer.Option(None, help="Folder with a folder of pictures for each class; `_` in a name reads as a blank.")
TEMPLATE = typer.Option([], help="Text with {} for the class name; repeat it to average over several.")
DRY_RUN = typer.Option(False, "--dry-run", help="Print what would be compared, and where; embed nothing.")


def main(
    overrides: list[str] = OVERRIDES,
    config: Path = CONFIG,
    captions: Path | None = CAPTIONS,
    image_root: Path | None = IMAGE_ROOT,
    classes: Path | None = CLASSES,
    template: list[str] = TEMPLATE,
    dry_run: bool = DRY_RUN,
) -> None:
    settings = load_config(config, overrides or [])
    asked = Asked(captions, image_root, classes, tuple(template))
    if dry_run:
        print(describe(settings, asked))
        return
    connect(settings)
    measured = measure(settings, asked)
    print(f"{measured.table}\nresults: {measured.path}")


if __name__ == "__main__":
    run_job(main)
