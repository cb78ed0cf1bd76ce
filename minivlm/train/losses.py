"""Losses of the three stages, as pure functions of log-probabilities. Called by `minivlm.train.stages`.

None of them averages over pairs: the caller divides by the *global* count of the optimizer step, so the value does not
depend on how samples are split over workers, micro-batches or rows.
"""

import operator
from dataclasses import astuple, dataclass
from functools import reduce

import torch.nn.functional as F
from torch import Tensor


def _check_same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"log-probabilities must have one shape [B], a broadcast would mix pairs: {shapes}")


def implicit_rewards(logps: Tensor, ref_logps: Tensor, *, beta: float) -> Tensor:
    """How much more likely the policy finds an answer than the reference does: beta * (logps - ref_logps).

    Args:
        logps: [B] float32. Sum of log-probabilities over answer tokens, in nats.
        ref_logps: [B], the same under the reference model.
        beta: > 0, unitless.

    Returns:
        [B] rewards, unitless.

    Raises:
        ValueError: shapes differ.
    """
    _check_same_shape(logps=logps, ref_logps=ref_logps)
    return beta * (logps - ref_logps)


def dpo_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Prefer the chosen answer over the rejected one, relative to the reference model: L_p of MPO.

    loss = -log sigmoid(r_c - r_r)

    Args:
        chosen_rewards: [B], see `implicit_rewards`.
        rejected_rewards: [B].

    Returns:
        [B], one loss per pair, not averaged.

    Raises:
        ValueError: shapes differ.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.
    """
    _check_same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


def bco_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, *, shift: float) -> Tensor:
    """Push chosen rewards above and rejected rewards below a common level: L_q of MPO.

    loss = -log sigmoid(r_c - shift) - log sigmoid(-(r_r - shift)), the sum of both signs, not halved.

    Args:
        chosen_rewards: [B], see `implicit_rewards`.
        rejected_rewards: [B].
        shift: the level, a constant without gradient; see `RewardShift`. TRL leaves it out (0).

    Returns:
        [B], one loss per pair, not averaged.

    Raises:
        ValueError: shapes differ.

    Source: Jung et al. 2024, arXiv:2404.04656, Eq. 8; Wang et al. 2024, arXiv:2411.10442, Eq. 4 and 5.
    """
    _check_same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    return -F.logsigmoid(chosen_rewards - shift) - F.logsigmoid(shift - rejected_rewards)


def generation_loss(chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """Negative log-likelihood per token of each chosen answer: L_g of MPO as the paper writes it.

    Args:
        chosen_logps: [B] summed over answer tokens, in nats.
        chosen_lengths: [B] answer tokens, end token included; > 0.

    Returns:
        [B] nats per token, not averaged over pairs.

    Raises:
        ValueError: shapes differ.

    Source: Wang et al. 2024, arXiv:2411.10442, Eq. 6. TRL and InternVL's code take one mean over all tokens instead;
    that is `train.mpo.sft_token_mean=true`.
    """
    _check_same_shape(chosen_logps=chosen_logps, chosen_lengths=chosen_lengths)
    return -chosen_logps / chosen_lengths


def smoothed_likelihood(logps: Tensor, mean_logps: Tensor, *, smoothing: float) -> Tensor:
    """Log-likelihood of a target that is a token with probability 1 - smoothing and else any of the vocabulary.

    (1 - smoothing) * log p(token) + smoothing * mean over the vocabulary of log p

    Args:
        logps: [M] log-probabilities of the supervised tokens, in nats.
        mean_logps: [M], mean log-probability over the vocabulary at the same places, in nats.
        smoothing: in [0, 1).

    Returns:
        [M], not averaged: the value does not depend on the layout.

    Raises:
        ValueError: shapes differ.

    Source: Szegedy et al. 2015, arXiv:1512.00567, section 7.
    """
    _check_same_shape(logps=logps, mean_logps=mean_logps)
    return (1 - smoothing) * logps + smoothing * mean_logps


@dataclass(frozen=True)
class MPOWeights:
    """Weights of the terms of MPO: L = dpo * L_p + bco * L_q + sft * L_g, all unitless.

    (1, 0, 0) is DPO, (0, 1, 0) is BCO, (0, 0, 1) is supervised training on the chosen answers, (1, 0, 1) is DPO+.

    Raises:
        ValueError: all are 0.
    """

    dpo: float = 0.8
    bco: float = 0.2
    sft: float = 1.0

    def __post_init__(self) -> None:
        if not any(astuple(self)):
            raise ValueError(f"all weights are 0, so there is no loss: {self}")


def mpo_loss(dpo: Tensor, bco: Tensor, sft: Tensor, weights: MPOWeights) -> Tensor:
    """Mixed Preference Optimization: the weighted sum of its three terms (same shape in and out).

    A term of weight 0 is left out of the sum: 0 * inf would be no number, in the loss or in its gradient.

    Source: Wang et al. 2024, arXiv:2411.10442, Eq. 2.
    """
    weighted = ((weights.dpo, dpo), (weights.bco, bco), (weights.sft, sft))
    return reduce(operator.add, [weight * term for weight, term in weighted if weight])


def reference_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Terms whose mean estimates how far the policy has moved: KL(reference || policy), in nats per answer.

    k3 = exp(d) - 1 - d with d = logps - ref_logps: never below 0, and 0 only where both agree. Its mean is unbiased
    over answers that the *reference* sampled. Pairs are a right and a wrong one chosen from those, so this compares
    steps and runs on the same pairs; over answers of another author it is no estimate of the divergence at all.

    Args:
        logps: [B] summed over answer tokens, in nats.
        ref_logps: [B], the same under the reference model.

    Returns:
        [B] float64, in nats; inf where an answer became exp(709) times as likely.

    Raises:
        ValueError: shapes differ.

    Source: Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html, the estimator k3.
    """
    _check_same_shape(logps=logps, ref_logps=ref_logps)
    log_ratio = (logps - ref_logps).double()
    return log_ratio.expm1() - log_ratio


class RewardShift:
    """Running level of the rewards for `bco_loss`: their mean over all pairs of all *earlier* optimizer steps.

    It is 0 in the first step, which is exact: there policy = reference. InternVL updates its mean per micro-batch and
    before use, which makes the loss depend on gradient accumulation; ours is updated once per step, after use, from
    sums over all workers. It is part of the checkpoint and does not move during evaluation.
    """

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    @property
    def value(self) -> float:
        """Mean reward so far, chosen and rejected together; 0 before the first update."""
        return self._sum / self._count if self._count else 0.0

    def update(self, reward_sum: float, num_pairs: int) -> None:
        """Add one step: `reward_sum` = sum of chosen and rejected rewards over all workers."""
        self._sum += reward_sum
        self._count += 2 * num_pairs

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"reward_sum": self._sum, "reward_count": self._count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict`."""
        self._sum, self._count = float(state["reward_sum"]), int(state["reward_count"])
