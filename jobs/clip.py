"""Train the CLIP tower on the caption pairs and report retrieval on the test split.

ray job submit --working-dir . -- python -m jobs.clip --config configs/tiny.yaml clip.epochs=6
"""

from pathlib import Path

from jobs.common import CONFIG, OVERRIDES, run_job
from minivlm.config import load_config
from minivlm.workflow.cluster import connect
from minivlm.workflow.steps import prepare_tower


def main(overrides: list[str] = OVERRIDES, config: Path = CONFIG) -> None:
    settings = load_config(config, overrides or [])
    connect(settings, trainers_first=True)
    print(f"clip: {prepare_tower(settings)}")


if __name__ == "__main__":
    run_job(main)
