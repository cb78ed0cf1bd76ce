"""A training stage of seconds without a cluster: rows, features and the loop itself in a group of this process."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minivlm.config import Config
from minivlm.data.batches import make_batches, payload_block, plan_blocks
from minivlm.data.features import FeatureCache
from minivlm.data.tokens import EncodedSample, TokenTable
from minivlm.model.checkpoint import MANIFEST, newest_complete
from minivlm.train.job import StageJob, plan_training
from minivlm.train.loop import train_loop
from tests.tiny_export import NUM_IMAGE_TOKENS, SIZES, WIDTH, build_export

LAYERS = 3
NUM_SAMPLES, BATCH_SIZE = 12, 4
STAGE = {"global_batch_size": BATCH_SIZE, "learning_rate": 1e-2, "warmup_fraction": 0.0, "epochs": 1}


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer/, clip/, a token table and picture features."""
    folder = tmp_path_factory.mktemp("stage")
    build_export(folder)
    generator = np.random.default_rng(0)
    digests = [f"{index:064x}" for index in range(NUM_SAMPLES)]
    cache = FeatureCache(folder / "features", "tower", (NUM_IMAGE_TOKENS, WIDTH))
    features = torch.randn(NUM_SAMPLES, *cache.shape, generator=torch.Generator().manual_seed(0))
    cache.append(digests, features.bfloat16())
    image_token = image_token_id(folder)
    samples = []
    for index, digest in enumerate(digests):
        answer = generator.integers(10, 300, 6 + index % 3)
        ids = np.concatenate([np.full(NUM_IMAGE_TOKENS, image_token), answer]).astype(np.int32)
        labels = np.where(np.arange(len(ids)) > NUM_IMAGE_TOKENS, ids, -100).astype(np.int32)
        samples.append(EncodedSample(f"s{index}", ids, labels, (digest,)))
    TokenTable.write(folder / "table", samples)
    return folder


def image_token_id(parts: Path) -> int:
    tokens = json.loads((parts / "tokenizer" / "tokenizer.json").read_text())["added_tokens"]
    return int(next(token["id"] for token in tokens if token["content"] == "<image>"))


def stage_job(parts: Path, run_dir: Path, stage: dict[str, Any] | None = None, **train: Any) -> StageJob:
    """A pretrain job of three steps with validation at the end; `stage` and `train` change their settings."""
    language = {key: value for key, value in SIZES.items() if key != "num_hidden_layers"}
    settings = {"num_workers": 1, "pack_length_tokens": 16, "pretrain": {**STAGE, **(stage or {})}, **train}
    tree = {"model": {"language_model": {**language, "num_hidden_layers": LAYERS}}, "train": settings}
    return StageJob(
        config=Config.model_validate(tree),
        stage="pretrain",
        run_dir=run_dir,
        train_table=parts / "table",
        val_table=parts / "table",
        sample_table=parts / "table",
        features_dir=parts / "features" / "tower",
        encoding=None,
        num_features=NUM_IMAGE_TOKENS,
        vision_size=WIDTH,
        tokenizer_path=str(parts / "tokenizer"),
        tower_path=str(parts / "clip"),
        image_token_id=image_token_id(parts),
        pad_token_id=0,
        vocab_size=320,
        initial_export=None,
        total_steps=NUM_SAMPLES // BATCH_SIZE,
    )


def planned_rows(job: StageJob, first_step: int) -> Iterator[dict[str, Any]]:
    """The micro-batches that are left."""
    for block in plan_blocks(
        job.train_table, plan_training(job, first_step=first_step), world_size=1, first_step=first_step
    ):
        table = make_batches(
            str(job.train_table), str(job.features_dir), job.image_token_id, job.pad_token_id, 0.0, payload_block(block)
        )
        yield from table.to_pylist()


def run(job: StageJob) -> tuple[dict[str, str], Path]:
    """The stage from where it is to its end: what the loop returned, and the newest checkpoint."""
    job.run_dir.mkdir(parents=True, exist_ok=True)
    kept = newest_complete(job.run_dir)
    first_step = json.loads((kept / MANIFEST).read_text())["step"] if kept else 0
    outcome = train_loop(job, planned_rows(job, first_step), torch.device("cpu"), lambda metrics, checkpoint: None)
    checkpoint = newest_complete(job.run_dir)
    assert checkpoint is not None or "error" in outcome
    return outcome, checkpoint or job.run_dir


def interrupted(job: StageJob, after: int) -> StageJob:
    """Run `after` steps, as if the process had died then; the job to continue with is returned."""
    rows = (row for row in planned_rows(job, 0) if row["step"] < after)
    job.run_dir.mkdir(parents=True)
    with pytest.raises(RuntimeError, match=f"ended within step {after}"):
        train_loop(job, rows, torch.device("cpu"), lambda metrics, checkpoint: None)
    return job
