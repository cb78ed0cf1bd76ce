"""Compare SFT on chosen, DPO, BCO, DPO + SFT and MPO on the same pairs, with and without chains of thought.

ray job submit --working-dir . -- python -m jobs.ablation miniworld.direct_reasoning_fraction=1 --seed 0 --seed 1
"""

from pathlib import Path

import typer

from jobs.common import CONFIG, DRY_RUN, OVERRIDES, run_job
from minivlm.workflow.ablation import check_plan, describe_plan, run_ablation
from minivlm.workflow.cluster import connect
from minivlm.workflow.dry_run import describe

SEED = typer.Option([0], "--seed", help="Value of `seed`, repeatable: each trains a whole path of its own.")
SECOND_ROUND = typer.Option(False, "--second-round", help="MPO once more, on answers of the model after MPO.")


def main(
    overrides: list[str] = OVERRIDES,
    config: Path = CONFIG,
    seed: list[int] = SEED,
    second_round: bool = SECOND_ROUND,
    dry_run: bool = DRY_RUN,
) -> None:
    settings = check_plan(config, overrides or [], seed)
    if dry_run:
        print(describe(settings))
        print(describe_plan(seed, second_round))
        return
    connect(settings, trainers_first=True)
    found = run_ablation(config, overrides or [], seeds=seed, second_round=second_round)
    print(found.table)
    print(f"table: {found.directory / 'table.md'}; reports: {' '.join(map(str, found.reports))}")


if __name__ == "__main__":
    run_job(main)
