"""Validate the rows, train what is missing (tokenizer, CLIP), draw what each stage trains on, fill the feature cache.

ray job submit --working-dir . -- python -m jobs.prepare --config configs/tiny.yaml data.max_bad_fraction=0.02
"""

from pathlib import Path

from jobs.common import CONFIG, DRY_RUN, OVERRIDES, run_job
from minivlm.config import load_config
from minivlm.data.pipeline import mixture_tables
from minivlm.workflow.cluster import connect
from minivlm.workflow.dry_run import describe
from minivlm.workflow.steps import prepare


def main(overrides: list[str] = OVERRIDES, config: Path = CONFIG, dry_run: bool = DRY_RUN) -> None:
    settings = load_config(config, overrides or [])
    if dry_run:
        print(describe(settings))
        return
    connect(settings)
    features = prepare(settings)
    print("\n".join(mixture_tables(settings)))
    print(f"features: {features}")


if __name__ == "__main__":
    run_job(main)
