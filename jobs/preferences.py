"""Build chosen/rejected pairs from the SFT model's own answers and add the reference log-probabilities.

ray job submit --working-dir . -- python -m jobs.preferences --config configs/tiny.yaml preferences.num_samples=16
"""

from pathlib import Path

from jobs.common import CONFIG, OVERRIDES, run_job
from minivlm.config import load_config
from minivlm.workflow.cluster import connect
from minivlm.workflow.steps import build_preferences


def main(overrides: list[str] = OVERRIDES, config: Path = CONFIG) -> None:
    settings = load_config(config, overrides or [])
    connect(settings)
    print(f"pairs: {build_preferences(settings)}")


if __name__ == "__main__":
    run_job(main)
