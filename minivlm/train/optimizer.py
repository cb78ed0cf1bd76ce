"""Groups of parameters and their learning rates over the steps: pure, shared by the stages and the clip job."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, or Muon for hidden matrices and AdamW for the rest, with linear warm-up and a schedule."""

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
    """Peak of Muon, which follows the same schedule; 0 = AdamW for everything."""

    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_fraction: float = 0.2
    """wsd: share of all steps at the end that decay."""

    min_lr_fraction: float = 0.0
    """Share of the peak at which the schedule ends."""


MUON_MOMENTUM = 0.95

Groups = list[dict[str, Any]]
"""Of an optimizer: parameters as `params`, beside their settings."""


def learning_rate_at(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """AdamW's rate in step `step` (0-based): up linearly to the peak, then down to the least rate.

    cosine: peak * (1 + cos(pi p)) / 2, with p the progress from the end of the warm-up to the end of the stage;
    wsd: the peak until the last `decay_fraction` of all steps, then peak * (1 - sqrt(p)), with p the progress in these.

    The least rate would be reached one step after the last.

    Source: wsd: Hu et al. 2024, arXiv:2404.06395, section 4.2 (MiniCPM); its decay by 1 - sqrt: Haegele et al. 2024,
    arXiv:2405.18392, section 3.
    """
    warmup_steps = round(settings.warmup_fraction * total_steps)
    if step < warmup_steps:
        return settings.learning_rate * (step + 1) / warmup_steps
    falls_for = total_steps - warmup_steps
    if settings.schedule == "wsd":
        falls_for = min(falls_for, round(settings.decay_fraction * total_steps))
    progress = min(max(0.0, (step - total_steps + falls_for) / max(1, falls_for)), 1.0)
    share = 1 - math.sqrt(progress) if settings.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * (settings.min_lr_fraction + (1 - settings.min_lr_fraction) * share)


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSettings) -> Groups:
    """What learns, for AdamW or for Muon with AdamW beside it."""
    if settings.muon_learning_rate:
        return muon_groups(named, settings)
    return decay_groups((parameter for _, parameter in named), settings.weight_decay)


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> Groups:
    """AdamW groups of the parameters that learn: matrices with decay, vectors (norms, biases) without."""
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    groups: Groups = [
        {"params": [parameter for parameter in learning if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in learning if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def muon_groups(named: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSettings) -> Groups:
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
