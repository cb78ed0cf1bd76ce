"""Look after the feature caches under storage_path: count them, compare checksums, remove what nobody reads.

python -m jobs.features stat --config configs/tiny.yaml
python -m jobs.features verify --drop
python -m jobs.features prune --unused --other-towers --yes
"""

from pathlib import Path
from typing import Literal

import typer

from jobs.common import CONFIG, OVERRIDES, run_job
from minivlm.config import load_config
from minivlm.workflow.features import prune_lines, stat_lines, verify_lines

ACTION = typer.Argument(..., help="What to do.")
DROP = typer.Option(False, "--drop", help="verify: remove damaged shards; their pictures are encoded again.")
UNUSED = typer.Option(False, "--unused", help="prune: also pictures that no prepared rows name.")
OTHERS = typer.Option(False, "--other-towers", help="prune: also the caches of all towers but this config's.")
AGE = typer.Option(1.0, "--older-than-h", min=0.1, help="prune: hours after which a torn file has no living writer.")
YES = typer.Option(False, "--yes", help="prune: remove, instead of saying what would be.")


def main(
    action: Literal["stat", "verify", "prune"] = ACTION,
    overrides: list[str] = OVERRIDES,
    config: Path = CONFIG,
    drop: bool = DROP,
    unused: bool = UNUSED,
    other_towers: bool = OTHERS,
    older_than_h: float = AGE,
    yes: bool = YES,
) -> None:
    settings = load_config(config, overrides or [])
    if action == "stat":
        lines = stat_lines(settings)
    elif action == "verify":
        lines = verify_lines(settings, drop=drop)
    else:
        lines = prune_lines(settings, unused=unused, other_towers=other_towers, older_than_h=older_than_h, yes=yes)
    print("\n".join(lines))


if __name__ == "__main__":
    run_job(main)
