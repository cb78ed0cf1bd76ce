"""Compare SFT on chosen, DPO, BCO, DPO + SFT and MPO on the same pairs, with and without chains of thought.

ray job submit --working-dir . -- python -m jobs.ablation miniworld.direct_reasoning_fraction=1 --seeds 0,1,2
"""

from pathlib import Path

import typer

from jobs.common import CONFIG, OVERRIDES, run_job
from minivlm.config import load_config
from minivlm.workflow.ablation import run_ablation
from minivlm.workflow.cluster import connect

SEEDS = typer.Option("0", help="Values of `seed`, with commas between: each trains a path of its own.")
SECOND_ROUND = typer.Option(False, "--second-round", help="MPO once more, on answers of the model after MPO.")


def main(
    overrides: list[str] = OVERRIDES, config: Path = CONFIG, seeds: str = SEEDS, second_round: bool = SECOND_ROUND
) -> None:
    numbers = [int(seed) for seed in seeds.split(",")]
    connect(load_config(config, overrides or []))
    found = run_ablation(config, overrides or [], seeds=numbers, second_round=second_round)
    print(found.table)
    print(f"table: {found.directory / 'table.md'}; reports: {' '.join(map(str, found.reports))}")


if __name__ == "__main__":
    run_job(main)
