"""Register the last stage's model in MLflow and make it @champion if it passes every gate.

ray job submit --working-dir . -- python -m jobs.register --config configs/tiny.yaml

Gates: complete (files, manifest), finite (weights, figures), reloads (stored files give the export's logits), better
(beats the champion on the same test questions beyond the noise). A refused version waits as @challenger.
"""

from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from jobs.common import CONFIG, OVERRIDES, run_job
from minivlm.config import load_config
from minivlm.log import quiet_libraries
from minivlm.workflow.register import register


def main(overrides: list[str] = OVERRIDES, config: Path = CONFIG) -> None:
    settings = load_config(config, overrides or [])
    quiet_libraries()
    disable_progress_bar()
    print(register(settings).table)


if __name__ == "__main__":
    run_job(main)
