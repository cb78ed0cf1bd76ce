"""Search projector kind and learning rate with ASHA; prints the best values as overrides for a full run.

ray job submit --working-dir . -- python -m jobs.tune --config configs/tiny.yaml tune.num_trials=8
"""

from pathlib import Path

from jobs.common import CONFIG, OVERRIDES, run_job
from minivlm.config import load_config
from minivlm.workflow.cluster import connect
from minivlm.workflow.steps import sweep


def main(overrides: list[str] = OVERRIDES, config: Path = CONFIG) -> None:
    settings = load_config(config, overrides or [])
    connect(settings)
    best = sweep(settings)
    print(f"best trial: {' '.join(best.reproduce)} (val_loss {best.best_val_loss:.4f})")
    print(f"for a full run: {' '.join(best.best_overrides)}")


if __name__ == "__main__":
    run_job(main)
