"""A model, batches and a DeepSpeed engine of seconds, for tests on one rank and on several."""

from collections.abc import Callable

import torch

from minivlm.model.language import build_language_model
from minivlm.model.projector import build_projector
from minivlm.model.vlm import MiniVLM
from minivlm.train.engine import Engine, Forward
from minivlm.train.losses import RewardShift
from minivlm.train.optimizer import OptimizerSettings
from minivlm.train.stages import Batch, LossSettings, StageLoss, StepTotals, count_totals, token_loss

SETTINGS = OptimizerSettings(1e-2, weight_decay=0.1, beta2=0.99, warmup_fraction=0.25, clip_norm=0.5)
STEPS = 4
IMAGE_TOKEN = 2


def tiny_vlm(projector: str = "mlp2x_gelu") -> MiniVLM:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    sizes |= {"head_dim": 16, "intermediate_size": 32, "rope_theta": 1e4, "tie_word_embeddings": True}
    language = build_language_model(path=None, architecture="llama", sizes=sizes, vocab_size=64, seed=0)
    reducing = {"resampler_queries": 4, "resampler_layers": 1, "resampler_heads": 2}
    return MiniVLM(build_projector(projector, 8, 16, num_features=4, sizes=reducing), language, IMAGE_TOKEN)


def micro_batch(generator: torch.Generator, num_images: int, num_rows: int = 1, length: int = 16) -> Batch:
    """Rows of one segment each; the first of them have a picture of four tokens."""
    input_ids = torch.randint(3, 60, (num_rows, length), generator=generator)
    input_ids[:num_images, 1:5] = IMAGE_TOKEN
    labels = input_ids.clone()
    labels[:, :8] = -100
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": torch.arange(length).expand(num_rows, length).clone(),
        "segment_ids": torch.arange(1, num_rows + 1)[:, None].expand(num_rows, length).clone(),
        "image_features": torch.randn(num_images, 4, 8, generator=generator).bfloat16(),
        "image_index": torch.arange(num_images),
    }


def padding() -> Batch:
    """The zero-weight micro-batch."""
    zeros = torch.zeros(1, 8, dtype=torch.int64)
    names = ("input_ids", "position_ids", "segment_ids")
    features = torch.zeros(0, 4, 8, dtype=torch.bfloat16)
    index = torch.zeros(0, dtype=torch.int64)
    return dict.fromkeys(names, zeros) | {"labels": zeros - 100, "image_features": features, "image_index": index}


def step_batches(step: int) -> list[Batch]:
    """One to four micro-batches: with pictures, without, and empty."""
    generator = torch.Generator().manual_seed(step)
    batches = [micro_batch(generator, 2, 2), micro_batch(generator, 0), micro_batch(generator, 1, length=24), padding()]
    return batches[: step + 1]


def loss_of(totals: StepTotals) -> Callable[[Forward, Batch], StageLoss]:
    return lambda forward, batch: token_loss(forward(batch), batch, totals, LossSettings(), RewardShift())


def run_engine(engine: Engine, steps: range) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in steps:
        batches = step_batches(step)
        totals = StepTotals(sum(int(count_totals(batch)[0]) for batch in batches))
        losses.append(sum(share["loss"].item() for share in engine.accumulate(loss_of(totals), batches)))
        norms.append(engine.update(step).grad_norm)
    return losses, norms


def make_engine(
    zero_stage: int,
    precision: str = "float32",
    model: MiniVLM | None = None,
    optimizer: OptimizerSettings = SETTINGS,
    offload: str = "none",
    num_lanes: int = 1,
) -> Engine:
    return Engine(
        model or tiny_vlm(),
        zero_stage=zero_stage,
        precision=precision,
        optimizer=optimizer,
        total_steps=STEPS,
        device=torch.device("cpu"),
        offload=offload,
        num_lanes=num_lanes,
    )
