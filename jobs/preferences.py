"""Build chosen/rejected pairs from a model's own answers and add the reference log-probabilities.

ray job submit --working-dir . -- python -m jobs.preferences --config configs/tiny.yaml preferences.num_samples=16

Another round, on pairs from the model after MPO: add preferences.policy=EXPORT here and to `jobs.train mpo`, which
printed that folder in the first (docs/preferences.md).
"""

from pathlib import Path

from jobs.common import CONFIG, DRY_RUN, OVERRIDES, run_job
from minivlm.config import load_config
from minivlm.workflow.cluster import connect
from minivlm.workflow.dry_run import describe
from minivlm.workflow.steps import build_preferences


def main(overrides: list[str] = OVERRIDES, config: Path = CONFIG, dry_run: bool = DRY_RUN) -> None:
    settings = load_config(config, overrides or [])
    if dry_run:
        print(describe(settings))
        return
    connect(settings)
    print(f"pairs: {build_preferences(settings)}")


if __name__ == "__main__":
    run_job(main)
