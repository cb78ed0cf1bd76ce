"""AdamW's groups and its learning rate over the steps: pure, shared by the stages and the clip job."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with linear warm-up and a cosine to 0."""

    learning_rate: float
    """Peak, per optimizer step."""

    weight_decay: float = 0.0
    """Of matrices; norms and biases are spared."""

    beta2: float = 0.99
    warmup_fraction: float = 0.0
    """Share of all steps."""

    clip_norm: float = 1.0


def learning_rate_at(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """Rate of step `step` (0-based): up linearly to the peak, then a cosine that would reach 0 at total_steps."""
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
