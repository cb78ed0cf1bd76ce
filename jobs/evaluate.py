"""Answer the held-out questions with each finished stage's model and write metrics and an HTML report.

A killed job continues behind the finished batches when the same command is typed again.

ray job submit --working-dir . -- python -m jobs.evaluate --config configs/tiny.yaml

One more model side by side: python -m jobs.evaluate evaluation.exports.base=/models/base

Asked in further ways: python -m jobs.evaluate "evaluation.variants=[shuffled,no_image,direct,cot]"
"""

from pathlib import Path

from jobs.common import CONFIG, OVERRIDES, run_job
from minivlm.config import load_config
from minivlm.workflow.cluster import connect
from minivlm.workflow.steps import evaluate


def main(overrides: list[str] = OVERRIDES, config: Path = CONFIG) -> None:
    settings = load_config(config, overrides or [])
    connect(settings)
    evaluation = evaluate(settings)
    print(f"{evaluation.table}\nreport: {evaluation.report}")


if __name__ == "__main__":
    run_job(main)
