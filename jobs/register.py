"""Register the last stage's model in MLflow and make it @champion if it beats the present one on the test split.

ray job submit --working-dir . -- python -m jobs.register --config configs/tiny.yaml
"""

from pathlib import Path

from jobs.common import CONFIG, OVERRIDES, run_job
from minivlm.config import load_config
from minivlm.log import quiet_libraries
from minivlm.workflow.steps import register


def main(overrides: list[str] = OVERRIDES, config: Path = CONFIG) -> None:
    settings = load_config(config, overrides or [])
    quiet_libraries()
    print(f"register: {register(settings)}")


if __name__ == "__main__":
    run_job(main)
