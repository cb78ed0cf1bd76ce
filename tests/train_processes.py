"""`train_loop` in plain processes over gloo: a group that a test can kill, without Ray, in about a second per run.

Processes are forked from a template (tests/forks.py). The job is a toy: random picture features, 10 samples whose
answers name them (token FIRST_ANSWER + i), and the small export of tests/tiny_export.py as initial weights.
"""

import importlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, Qwen3ForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from minivlm.config import Config
from minivlm.data.batches import make_batches, payload_block, plan_blocks
from minivlm.data.collate import unpack_batch
from minivlm.data.features import FeatureCache
from minivlm.data.tokenizer import load_tokenizer
from minivlm.data.tokens import IGNORE, EncodedSample, TokenTable
from minivlm.train.engine import _quiet_start
from minivlm.train.feed import newest_step
from minivlm.train.job import StageJob, count_steps, plan_training
from minivlm.train.loop import StageWorker, train_loop
from tests.forks import Forked, join
from tests.tiny_export import NUM_IMAGE_TOKENS, WIDTH, build_export

NUM_SAMPLES, NUM_VALIDATION = 10, 4
FIRST_ANSWER = 200
GROUP_TIMEOUT_S = 90

_quiet_start(torch.device("cpu"))  # as every engine does first: else Muon's products are compiled when imported
original_muon = importlib.import_module("deepspeed.runtime.zero.muon.original_muon")

# What loading a model does once per process, half of a run's time here: done before the template is forked.
MODEL_CLASSES = (CLIPVisionModel, LlavaForConditionalGeneration, Qwen3ForCausalLM)
get_checkpoint_conversion_mapping("qwen3")


def make_toy(folder: Path) -> StageJob:
    """An sft job of 3 epochs of 3 steps (4, 4 and 2 samples), checkpoints after steps 4, 8 and 9."""
    export = build_export(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    image_token_id = int(tokenizer.convert_tokens_to_ids("<image>"))
    generator = np.random.default_rng(0)
    digests = [f"{i:064x}" for i in range(NUM_SAMPLES + NUM_VALIDATION)]
    cache = FeatureCache(folder / "features", "toy", (NUM_IMAGE_TOKENS, WIDTH))
    cache.append(digests, torch.randn(len(digests), NUM_IMAGE_TOKENS, WIDTH, generator=torch.manual_seed(0)).bfloat16())
    samples = [_sample(i, digest, image_token_id, generator) for i, digest in enumerate(digests)]
    TokenTable.write(folder / "train", samples[:NUM_SAMPLES])
    TokenTable.write(folder / "val", samples[NUM_SAMPLES:])
    stage = {"global_batch_size": 4, "epochs": 3, "learning_rate": 3e-3, "num_evals": 2, "clip_norm": 0.5}
    config = Config.model_validate(
        {"storage_path": str(folder), "train": {"checkpoint_every_steps": 4, "sft": stage, "mpo": stage}}
    )
    return StageJob(
        config=config,
        stage="sft",
        run_dir=folder / "run",
        train_table=folder / "train",
        val_table=folder / "val",
        sample_table=folder / "val",
        features_dir=cache.directory,
        encoding=None,
        num_features=NUM_IMAGE_TOKENS,
        vision_size=WIDTH,
        tokenizer_path=str(folder / "tokenizer"),
        tower_path=str(folder / "clip"),
        image_token_id=image_token_id,
        pad_token_id=int(tokenizer.pad_token_id),
        vocab_size=len(tokenizer),
        initial_export=export,
        total_steps=count_steps(NUM_SAMPLES, config.train.sft),
    )


def _sample(index: int, digest: str, image_token_id: int, generator: np.random.Generator) -> EncodedSample:
    question = generator.integers(20, 190, size=2 + index % 4)
    answer = np.concatenate([[FIRST_ANSWER + index], generator.integers(20, 190, size=1 + index % 3)])
    ids = np.concatenate([[image_token_id] * NUM_IMAGE_TOKENS, question, answer]).astype(np.int32)
    labels = ids.copy()
    labels[: -len(answer)] = IGNORE
    return EncodedSample(f"sample-{index}", ids, labels, (digest,))


def changed(job: StageJob, run_dir: Path, **settings: Any) -> StageJob:
    """The job in another folder with other settings; those of the stage are given as `stage={...}`."""
    tree = job.config.model_dump(mode="json")
    tree["train"][job.stage] |= settings.pop("stage", {})
    tree["train"] |= settings
    return replace(job, config=Config.model_validate(tree), run_dir=run_dir)


class Group:
    """The processes of one run of a job."""

    def __init__(self, job: StageJob, *, hold: tuple[int, int] | None = None, resave_to: Path | None = None) -> None:
        """Start them.

        Args:
            hold: (rank, step): this rank stops for good before it reads that step, so that a kill finds it there and
                the others in the middle of the step.
            resave_to: only load the newest checkpoint's training state, and write it there.
        """
        self.world_size = job.config.train.num_workers
        job.run_dir.mkdir(parents=True, exist_ok=True)
        self.folder = job.run_dir / f"attempt-{len(list(job.run_dir.glob('attempt-*')))}"
        self.folder.mkdir()
        self.processes: list[Forked] = []
        for rank in range(self.world_size):
            held_step = hold[1] if hold is not None and hold[0] == rank else None
            self.processes.append(Forked(_rank, job, rank, self.folder, held_step, resave_to))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Look every millisecond, and now and then whether all still run."""
        deadline = time.monotonic() + GROUP_TIMEOUT_S
        for look in count():
            if condition():
                return
            if look % 50 == 0:
                assert time.monotonic() < deadline, self.log()
                assert not any(process.exitcode for process in self.processes), self.log()
            time.sleep(0.001)

    def kill(self, *ranks: int) -> None:
        """SIGKILL; those that are left are killed when they fail, as Ray Train does."""
        for rank in ranks:
            self.processes[rank].kill()
        self.join()

    def kill_held(self) -> None:
        """SIGKILL the rank that holds, once it does."""
        self.wait_for(lambda: bool(list(self.folder.glob("held-*"))))
        self.kill(*(int(path.name.removeprefix("held-")) for path in self.folder.glob("held-*")))

    def join(self) -> None:
        """Wait for all; one that fails takes the others with it."""
        join(self.processes, GROUP_TIMEOUT_S)

    def outcome(self) -> dict[str, str]:
        """What `train_loop` returned, the same on all ranks."""
        self.join()
        assert all(process.exitcode == 0 for process in self.processes), self.log()
        found = [json.loads((self.folder / f"outcome-{rank}.json").read_text()) for rank in range(self.world_size)]
        assert all(outcome == found[0] for outcome in found)
        return dict(found[0])

    def seen(self) -> list[tuple[int, list[int]]]:
        """(step, samples) of each micro-batch that a rank read; the first supervised token names the sample."""
        texts = [path.read_text() for path in sorted(self.folder.glob("seen-*.jsonl"))]
        lines = [line for text in texts for line in text[: text.rfind("\n") + 1].splitlines()]
        return [(step, samples) for step, samples in map(json.loads, lines)]

    def log(self) -> str:
        """What the ranks printed."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("log-*.txt")))


def run_job(job: StageJob) -> dict[str, str]:
    """Run (or continue) a job to its end; returns the loop's outcome."""
    return Group(job).outcome()


def _rank(job: StageJob, rank: int, folder: Path, held_step: int | None, resave_to: Path | None) -> None:
    world_size = job.config.train.num_workers
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)})
    with (folder / f"log-{rank}.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        # Muon's own choice where the CPU has no bfloat16: else 8 bits amplify what another order of sums changes.
        original_muon.ns_compute_dtype = lambda method: torch.float32
        outcome: dict[str, str] = {}
        if resave_to is not None:
            StageWorker(job, torch.device("cpu"), lambda metrics, checkpoint: None).engine.save(resave_to)
        else:
            rows = _rows(job, rank, folder, held_step)
            outcome = train_loop(job, rows, torch.device("cpu"), lambda metrics, checkpoint: None)
        (folder / f"outcome-{rank}.json").write_text(json.dumps(outcome))
        dist.barrier()


def _rows(job: StageJob, rank: int, folder: Path, held_step: int | None) -> Iterator[dict[str, Any]]:
    """This rank's micro-batches of the steps that are left, as Ray Data would give them; they are noted when read."""
    first_step, world_size = newest_step(job.run_dir), job.config.train.num_workers
    steps = plan_training(job, first_step=first_step)
    blocks = plan_blocks(job.train_table, steps, world_size=world_size, first_step=first_step)
    with (folder / f"seen-{rank}.jsonl").open("w") as notes:
        for block in blocks[rank::world_size]:
            ids = (job.image_token_id, job.pad_token_id)
            for row in make_batches(
                str(job.train_table), str(job.features_dir), *ids, 0.0, payload_block(block)
            ).to_pylist():
                if row["step"] == held_step:
                    (folder / f"held-{rank}").touch()
                    time.sleep(GROUP_TIMEOUT_S)
                labels = unpack_batch(row["payload"])["labels"]
                samples = (labels[labels >= FIRST_ANSWER] - FIRST_ANSWER).tolist()
                print(json.dumps([row["step"], samples]), file=notes, flush=True)
                yield row
