"""Where recorded answers looked in their pictures: a task on the cluster that runs exports over a few questions.

The evaluation asks for a handful of questions per checkpoint. `minivlm/model/attention.py` says what is averaged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import torch
from PIL import Image

from minivlm.config.run import EvaluationConfig
from minivlm.data.chat import encode_prompt
from minivlm.data.errors import DataError
from minivlm.data.images import ImageLimits, read_validated_image
from minivlm.model.attention import answer_attention, token_grid
from minivlm.model.export import Export, load_export, load_export_tower
from minivlm.model.generate import Prompt
from minivlm.model.tokenizer import encode_text
from minivlm.model.vision import VisionTower
from minivlm.schema import Message


@dataclass(frozen=True)
class Answered:
    """A question with the answer that an export gave."""

    messages: tuple[Message, ...]
    images: tuple[str, ...]
    image_sha256: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Looked:
    """Where one answer looked."""

    seen: tuple[np.ndarray, ...]
    """What the tower saw of each picture, [H, W, 3] uint8."""

    grids: tuple[np.ndarray | None, ...]
    """Weights over its patches, [side, side]; None where image tokens have no place in the picture."""

    share: float
    """Of all attention what went to the pictures."""


def look(
    asked: Sequence[tuple[Path, Sequence[Answered]]], limits: ImageLimits, pool: EvaluationConfig
) -> list[list[Looked | None]]:
    """Run each export over its answered questions, in one task with the resources of a generation actor.

    Returns:
        For each export one entry per question; None where a picture is not there any more as it was validated.
    """
    device = "cuda" if pool.gpus_per_actor > 0 else "cpu"
    task = ray.remote(look_all).options(num_cpus=pool.cpus_per_actor, num_gpus=pool.gpus_per_actor, max_retries=1)
    looked: list[list[Looked | None]] = ray.get(task.remote(list(asked), limits, device, pool.threads_per_actor))
    return looked


def look_one(export: Export, tower: VisionTower, pictures: Sequence[Image.Image], asked: Answered) -> Looked:
    """One question; the recorded answer is tokenized anew."""
    pixel_values = tower.preprocess(pictures)
    ids = encode_prompt(export.tokenizer, asked.messages, export.num_image_tokens, num_images=len(pictures))
    prompt = Prompt(ids, tower.encode(pixel_values))
    weights = answer_attention(export.vlm, prompt, encode_text(export.tokenizer, asked.answer))
    grids = [token_grid(own, export.vlm.projector, tower.num_features) for own in weights]
    return Looked(
        tuple(_as_seen(values, tower) for values in pixel_values),
        tuple(None if grid is None else grid.numpy() for grid in grids),
        float(weights.sum()),
    )


def look_all(
    asked: list[tuple[Path, list[Answered]]], limits: ImageLimits, device: str, num_threads: int
) -> list[list[Looked | None]]:
    """What the task runs; arguments and result as of `look`."""
    torch.set_num_threads(num_threads)
    looked = []
    for folder, questions in asked:
        export, tower = load_export(folder), load_export_tower(folder, batch_size=1, device=device)
        export.vlm.to(device).eval()
        own: list[Looked | None] = []
        for question in questions:
            places = zip(question.images, question.image_sha256, strict=True)
            try:
                pictures = [read_validated_image(Path(path), digest, limits) for path, digest in places]
            except DataError:
                own.append(None)
                continue
            own.append(look_one(export, tower, pictures, question))
        looked.append(own)
    return looked


def _as_seen(pixel_values: torch.Tensor, tower: VisionTower) -> np.ndarray:
    """Normalised [3, H, W] back to a picture, [H, W, 3] uint8."""
    processor = tower.image_processor
    values = pixel_values.permute(1, 2, 0)
    if processor.do_normalize:
        values = values * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
    scale = 255.0 if processor.do_rescale else 1.0
    return np.asarray((values * scale).round().clamp(0, 255).to(torch.uint8))
