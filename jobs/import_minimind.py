"""Turn a MiniMind language model into a folder that `model.language_model.path` and transformers load.

python -m jobs.import_minimind full_sft_768.pth my/minimind
python -m jobs.import_minimind mine.pth my/minimind --heads 12 --rope-theta 1e6
"""

from pathlib import Path

import typer

from jobs.common import run_job
from minivlm.model.minimind import Heads, load_minimind

SOURCE = typer.Argument(..., help="State dict (.pth) of a dense MiniMind language model.")
TARGET = typer.Argument(..., help="New folder.")
HEADS = typer.Option(None, min=1, help="Query heads, where they are not those of a published size.")
THETA = typer.Option(1e6, help="RoPE base; used with --heads.")


def main(source: Path = SOURCE, target: Path = TARGET, heads: int | None = HEADS, rope_theta: float = THETA) -> None:
    if target.exists():
        raise ValueError(f"{target} exists. Type a folder that does not, or remove it.")
    model = load_minimind(source, Heads(heads, rope_theta) if heads else None)
    model.save_pretrained(target)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__}, {size / 1e6:.2f}M parameters: {target}")


if __name__ == "__main__":
    run_job(main)
