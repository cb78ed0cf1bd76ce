"""Train the byte-level BPE tokenizer on the training corpus (or check the configured one).

ray job submit --working-dir . -- python -m jobs.tokenizer --config configs/tiny.yaml tokenizer.vocab_size=2048
"""

from pathlib import Path

from jobs.common import CONFIG, OVERRIDES, run_job
from minivlm.config import load_config
from minivlm.data.pipeline import prepare_samples, prepare_tokenizer
from minivlm.workflow.cluster import connect


def main(overrides: list[str] = OVERRIDES, config: Path = CONFIG) -> None:
    settings = load_config(config, overrides or [])
    connect(settings)
    prepare_samples(settings)
    print(f"tokenizer: {prepare_tokenizer(settings)}")


if __name__ == "__main__":
    run_job(main)
