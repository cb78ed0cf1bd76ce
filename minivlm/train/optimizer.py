"""Groups of parameters and their learning rates over the steps: pure, shared by the stages and the clip job."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, or Muon for hidden matrices and AdamW for the rest, with linear warm-up and a cosine to 0."""

    learning_rate: float
    """Peak of AdamW, per optimizer step."""

    weight_decay: float = 0.0
    """Of matrices; norms and biases are spared."""

    beta2: float = 0.99
    warmup_fraction: float = 0.0
    """Share of all steps."""

    clip_norm: float = 1.0
    """Of all gradients together. Not applied with Muon: DeepSpeed would scale its updates, which have a fixed size."""

    muon_learning_rate: float = 0.0
    """Peak of Muon; 0 = AdamW for everything."""


MUON_MOMENTUM = 0.95


def learning_rate_at(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """AdamW's rate in step `step` (0-based): up linearly to the peak, then a cosine that would reach 0 at the end."""
    warmup_steps = round(settings.warmup_fraction * total_steps)
    if step < warmup_steps:
        return settings.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of the parameters that learn: matrices with decay, vectors (norms, biases) without."""
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in learning if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in learning if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def muon_groups(named: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Groups for Muon (matrices inside the language model's layers) and for AdamW (all else that learns).

    Source: Keller Jordan 2024, https://kellerjordan.github.io/posts/muon/ (which parameters take it).
    """
    learning = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    hidden = [parameter for name, parameter in learning if ".layers." in name and parameter.ndim == 2]
    chosen = {id(parameter) for parameter in hidden}
    rest = [parameter for _, parameter in learning if id(parameter) not in chosen]
    adam = {"use_muon": False, "betas": (0.9, settings.beta2), "eps": 1e-8, "lr": settings.learning_rate}
    muon = {"use_muon": True, "momentum": MUON_MOMENTUM, "lr": settings.muon_learning_rate}
    groups = [{**group, **adam} for group in decay_groups(rest, settings.weight_decay)]
    return groups + ([{"params": hidden, "weight_decay": settings.weight_decay, **muon}] if hidden else [])
