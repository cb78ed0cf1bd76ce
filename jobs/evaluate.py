"""Answer the held-out questions with each finished stage's model and write metrics and an HTML report.

A killed job continues behind the finished batches when the same command is typed again.

ray job submit --working-dir . -- python -m jobs.evaluate --config configs/tiny.yaml

One more model side by side: python -m jobs.evaluate evaluation.exports.base=/models/base

Against another model than sft: python -m jobs.evaluate evaluation.baseline=base evaluation.exports.base=/models/base

Asked in further ways: python -m jobs.evaluate "evaluation.variants=[shuffled,no_image,jpeg,few_shot]"
evaluation.num_shots=4
"""

from pathlib import Path

from jobs.common import CONFIG, DRY_RUN, OVERRIDES, run_job
from minivlm.config import load_config
from minivlm.workflow.cluster import connect
from minivlm.workflow.dry_run import describe
from minivlm.workflow.steps import evaluate


def main(overrides: list[str] = OVERRIDES, config: Path = CONFIG, dry_run: bool = DRY_RUN) -> None:
    settings = load_config(config, overrides or [])
    if dry_run:
        print(describe(settings))
        return
    connect(settings)
    evaluation = evaluate(settings)
    print(f"{evaluation.table}\nreport: {evaluation.report}")


if __name__ == "__main__":
    run_job(main)
