"""The stage table: all that pretrain, sft and mpo differ in, besides their settings in `train.<stage>`.

A loss function maps the log-probabilities of one micro-batch to its share of the step's loss, divided by counts of the
*whole* step, so that shares add up over micro-batches and workers. Called by `minivlm.train.loop`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minivlm.errors import JobError
from minivlm.model.vlm import TokenLogps, sequence_logps
from minivlm.train.losses import (
    MPOWeights,
    RewardShift,
    bco_loss,
    dpo_loss,
    generation_loss,
    implicit_rewards,
    mpo_loss,
    reference_kl,
    smoothed_likelihood,
)

Batch = dict[str, Tensor]


class TrainingError(JobError):
    """Training cannot go on; the message says why and what to type."""


@dataclass(frozen=True)
class StepTotals:
    """Counts over all micro-batches and workers of one optimizer step: the divisors of its losses."""

    tokens: int
    """Supervised tokens; in MPO of chosen and rejected answers together."""

    pairs: int = 0
    chosen_tokens: int = 0
    """Supervised tokens of chosen answers (MPO)."""


@dataclass(frozen=True)
class LossSettings:
    """What the losses read from the settings of a stage."""

    beta: float = 0.1
    weights: MPOWeights = MPOWeights()
    sft_token_mean: bool = False
    label_smoothing: float = 0.0
    """Of `token_loss` where the forward returns mean log-probabilities: in training, never in validation."""


@dataclass(frozen=True)
class StageLoss:
    """A micro-batch's share of the step: `loss` to differentiate, `metrics` detached; both add up to the step's."""

    loss: Tensor
    metrics: dict[str, Tensor]


LossFunction = Callable[[TokenLogps, Batch, StepTotals, LossSettings, RewardShift], StageLoss]


@dataclass(frozen=True)
class Stage:
    """One row of the table."""

    name: str
    previous: Literal["pretrain", "sft"] | None
    """Stage whose export gives the initial weights."""

    group_size: int
    """Table entries per unit of the plan: 1 = a sample, 2 = a chosen and a rejected answer."""

    columns: tuple[str, ...]
    """Batch columns beyond those that every stage has."""

    loss: LossFunction
    metric_names: tuple[str, ...]
    """Keys of `StageLoss.metrics`, in the order in which they are summed over workers."""

    command: str
    """What to type to get this stage's result."""


def count_totals(batch: Batch) -> Tensor:
    """[3] int64: supervised tokens, pairs, supervised tokens of chosen answers of one micro-batch (pairs: MPO only)."""
    supervised = batch["labels"] != -100
    if "reference_logps" not in batch:
        return torch.tensor([int(supervised.sum()), 0, 0])
    is_chosen = supervised & (batch["segment_ids"] % 2 == 1)
    return torch.tensor([int(supervised.sum()), batch["reference_logps"].numel() // 2, int(is_chosen.sum())])


def token_loss(
    token_logps: TokenLogps, batch: Batch, totals: StepTotals, settings: LossSettings, shift: RewardShift
) -> StageLoss:
    """Negative log-likelihood, mean over the step's supervised tokens (pretrain and sft); a MoE router loss is added.

    The router loss of a micro-batch counts with its share of the step's supervised tokens.
    """
    logps = token_logps.logps
    if token_logps.mean_logps is not None:
        logps = smoothed_likelihood(logps, token_logps.mean_logps, smoothing=settings.label_smoothing)
    share = logps.numel() / totals.tokens
    loss = -logps.sum() / totals.tokens + token_logps.aux_loss * share
    return StageLoss(loss, {"loss": loss.detach()})


def preference_loss(
    token_logps: TokenLogps, batch: Batch, totals: StepTotals, settings: LossSettings, shift: RewardShift
) -> StageLoss:
    """Mixed Preference Optimization, mean over the step's pairs (the generation term optionally over its tokens).

    Segments 2i+1 and 2i+2 of the batch are the chosen and rejected answer of pair i, and `reference_logps` [S] holds
    their log-probabilities under the stage's initial weights. The router loss of a MoE counts with its share of pairs.
    """
    reference = batch["reference_logps"]
    logps = sequence_logps(token_logps, reference.numel())
    lengths = torch.bincount(token_logps.segments - 1, minlength=reference.numel()).to(logps.dtype)
    chosen, rejected = logps[0::2], logps[1::2]
    chosen_rewards = implicit_rewards(chosen, reference[0::2], beta=settings.beta)
    rejected_rewards = implicit_rewards(rejected, reference[1::2], beta=settings.beta)
    dpo = dpo_loss(chosen_rewards, rejected_rewards).sum() / totals.pairs
    bco = bco_loss(chosen_rewards, rejected_rewards, shift=shift.value).sum() / totals.pairs
    if settings.sft_token_mean:
        sft = -chosen.sum() / totals.chosen_tokens
    else:
        sft = generation_loss(chosen, lengths[0::2]).sum() / totals.pairs
    loss = mpo_loss(dpo, bco, sft, settings.weights) + token_logps.aux_loss * (chosen.numel() / totals.pairs)
    margins = chosen_rewards - rejected_rewards
    kl = reference_kl(logps.detach(), reference)
    metrics = {
        "loss": loss,
        "loss/dpo": dpo,
        "loss/bco": bco,
        "loss/sft": sft,
        "rewards/chosen": chosen_rewards.sum() / totals.pairs,
        "rewards/rejected": rejected_rewards.sum() / totals.pairs,
        "rewards/margins": margins.sum() / totals.pairs,
        "rewards/accuracies": (margins > 0).to(margins.dtype).sum() / totals.pairs,
        "logps/chosen": chosen.sum() / totals.pairs,
        "logps/rejected": rejected.sum() / totals.pairs,
        "length/chosen": lengths[0::2].sum() / totals.pairs,
        "length/rejected": lengths[1::2].sum() / totals.pairs,
        "kl": kl.sum() / (2 * totals.pairs),
    }
    return StageLoss(loss, {name: value.detach() for name, value in metrics.items()})


MPO_METRICS = (
    *("loss", "loss/dpo", "loss/bco", "loss/sft", "rewards/chosen", "rewards/rejected", "rewards/margins"),
    *("rewards/accuracies", "logps/chosen", "logps/rejected", "length/chosen", "length/rejected", "kl"),
)

STAGES: dict[str, Stage] = {
    "pretrain": Stage("pretrain", None, 1, (), token_loss, ("loss",), "python -m jobs.train pretrain"),
    "sft": Stage("sft", "pretrain", 1, (), token_loss, ("loss",), "python -m jobs.train sft"),
    "mpo": Stage("mpo", "sft", 2, ("reference_logps",), preference_loss, MPO_METRICS, "python -m jobs.train mpo"),
}


def check_first_step(metrics: dict[str, float], *, precision: str) -> None:
    """At MPO's first step policy = reference, so L_p = ln 2 and L_q = 2 ln 2 (with the default weights 0.8318 + NLL).

    Args:
        metrics: the step's means, as `preference_loss` names them.
        precision: "float32" or "bfloat16"; the latter rounds log-probabilities, so it gets a wider tolerance.

    Raises:
        TrainingError: the reference log-probabilities come from other weights than the stage starts from.
    """
    tolerance = 0.05 if precision == "bfloat16" else 2e-3
    for name, expected in (("loss/dpo", math.log(2)), ("loss/bco", 2 * math.log(2))):
        if abs(metrics[name] - expected) > tolerance:
            raise TrainingError(
                f"{name} is {metrics[name]:.5f} at MPO's first step and must be {expected:.5f}: the reference "
                "log-probabilities were not computed by the SFT model that MPO starts from. "
                "Delete reference.json in the folder of the pairs and run: python -m jobs.preferences"
            )
