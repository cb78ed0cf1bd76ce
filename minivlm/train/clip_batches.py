"""What the clip job's workers need, and its micro-batches: uint8 pictures and caption ids, in a planned order.

Without torch, because Ray Data's processes import it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import save


@dataclass(frozen=True)
class ClipJob:
    """One clip training run, picklable and plain. Pairs 0..num_train-1 train; val and test pairs follow."""

    clip: dict[str, Any]
    """The `clip` settings."""

    seed: int
    work: Path
    """Scratch folder on shared storage: pixels, captions, metrics."""

    target: Path
    num_pictures: int
    num_train: int
    num_val: int
    num_test: int
    global_batch_size: int
    """A multiple of world_size, at most num_train."""

    total_steps: int
    world_size: int
    threads: int
    use_gpu: bool
    precision: str
    """float32, or bfloat16 (autocast)."""

    vocab_size: int
    bos_token_id: int
    eos_token_id: int
    """Ends every caption and pads it."""


@dataclass(frozen=True)
class Captions:
    """Caption ids of all pairs, and the picture of each. Equal captions share one caption_ids entry."""

    input_ids: np.ndarray
    """[N, T] int32, padded."""

    pictures: np.ndarray
    """[N] int32, row of the pixel file."""

    caption_ids: np.ndarray
    """[N] int32."""

    @classmethod
    def build(cls, ids: Sequence[list[int]], pictures: Sequence[int], *, pad_token_id: int) -> "Captions":
        """Pad to the longest caption and number the distinct ones."""
        width = max(len(row) for row in ids)
        input_ids = np.full((len(ids), width), pad_token_id, np.int32)
        numbers: dict[tuple[int, ...], int] = {}
        for index, row in enumerate(ids):
            input_ids[index, : len(row)] = row
        caption_ids = [numbers.setdefault(tuple(row), len(numbers)) for row in ids]
        return cls(input_ids, np.asarray(pictures, np.int32), np.asarray(caption_ids, np.int32))

    def save(self, folder: Path) -> None:
        """Write captions.npz."""
        np.savez(
            folder / "captions.npz", input_ids=self.input_ids, pictures=self.pictures, caption_ids=self.caption_ids
        )

    @classmethod
    def load(cls, folder: Path) -> "Captions":
        """Inverse of `save`."""
        with np.load(folder / "captions.npz") as arrays:
            return cls(arrays["input_ids"], arrays["pictures"], arrays["caption_ids"])


def pixels_file(work: Path) -> Path:
    """Raw uint8 [num_pictures, 3, H, W]."""
    return work / "pixels.bin"


def open_pixels(job: ClipJob) -> np.ndarray:
    """The pixel file, memory-mapped."""
    side = job.clip["image_size_px"]
    return np.memmap(pixels_file(job.work), np.uint8, mode="r", shape=(job.num_pictures, 3, side, side))


def pairs_of(job: ClipJob, step: int, rank: int) -> np.ndarray:
    """Training pairs of a rank in a step. An epoch is a seeded shuffle cut into whole steps; the rest is dropped."""
    per_epoch = job.num_train // job.global_batch_size
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng([job.seed, epoch]).permutation(job.num_train)
    mine = job.global_batch_size // job.world_size
    start = position * job.global_batch_size + rank * mine
    return order[start : start + mine]


def load_pairs(job: ClipJob, captions: Captions, pairs: np.ndarray) -> dict[str, np.ndarray]:
    """pixels [B, 3, H, W] uint8, input_ids [B, T] int64, pictures and caption_ids [B] int64."""
    pictures = captions.pictures[pairs]
    return {
        "pixels": np.asarray(open_pixels(job)[pictures]),
        "input_ids": captions.input_ids[pairs].astype(np.int64),
        "pictures": pictures.astype(np.int64),
        "caption_ids": captions.caption_ids[pairs].astype(np.int64),
    }


STEPS_PER_BLOCK = 16
"""Micro-batches of one rank that one task makes: a block costs Ray's scheduler as much as a small step."""


def num_blocks(job: ClipJob) -> int:
    """Blocks of the whole run; block b holds the next steps of rank b % world_size."""
    return -(-job.total_steps // STEPS_PER_BLOCK) * job.world_size


def make_rows(job: ClipJob, block: pa.Table) -> pa.Table:
    """Ray Data task: block numbers -> columns id (step * world_size + rank), payload (safetensors of `load_pairs`)."""
    captions = Captions.load(job.work)
    numbers = []
    for number in block["id"].to_pylist():
        group, rank = divmod(number, job.world_size)
        steps = range(group * STEPS_PER_BLOCK, min((group + 1) * STEPS_PER_BLOCK, job.total_steps))
        numbers += [step * job.world_size + rank for step in steps]
    pairs = [pairs_of(job, *divmod(number, job.world_size)) for number in numbers]
    payloads = [save(load_pairs(job, captions, chosen)) for chosen in pairs]
    return pa.table({"id": pa.array(numbers, pa.int64()), "payload": pa.array(payloads, pa.large_binary())})
