"""Losses of the three stages: hand values, identities, and gradients that do not depend on the layout."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from minivlm.model.vlm import TokenLogps
from minivlm.train.losses import (
    MPOWeights,
    RewardShift,
    bco_loss,
    dpo_loss,
    generation_loss,
    implicit_rewards,
    mpo_loss,
    smoothed_likelihood,
)
from minivlm.train.stages import (
    STAGES,
    LossSettings,
    StepTotals,
    token_loss,
)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mpo_terms(
    chosen: float, ref_chosen: float, rejected: float, ref_rejected: float, shift: float
) -> tuple[Tensor, ...]:
    chosen_rewards = implicit_rewards(t(chosen), t(ref_chosen), beta=0.1)
    rejected_rewards = implicit_rewards(t(rejected), t(ref_rejected), beta=0.1)
    terms = dpo_loss(chosen_rewards, rejected_rewards), bco_loss(chosen_rewards, rejected_rewards, shift=shift)
    return *terms, generation_loss(t(chosen), t(5))


def test_mpo_matches_the_reference_numbers():
    dpo, bco, sft = mpo_terms(-10, -11, -12, -11.5, shift=0.025)
    assert_close(torch.cat([dpo, bco, sft]), t(0.620957, 1.312700, 2.0), atol=1e-6, rtol=0)
    assert_close(mpo_loss(dpo, bco, sft, MPOWeights()), t(2.759306), atol=1e-6, rtol=0)


def test_mpo_without_shift_matches_trl():
    dpo, bco, sft = mpo_terms(-10, -11, -12, -11.5, shift=0.0)
    assert_close(torch.cat([bco, mpo_loss(dpo, bco, sft, MPOWeights())]), t(1.312856, 2.759337), atol=1e-6, rtol=0)


def test_second_reference_call():
    dpo, bco, _ = mpo_terms(-9.5, -11, -13.5, -11.5, shift=0.0)  # rewards .15 and -.20
    assert_close(torch.cat([dpo, bco]), t(0.533382, 1.219096), atol=1e-6, rtol=0)


def test_zero_step_is_a_constant_plus_the_likelihood():
    dpo, bco, sft = mpo_terms(-10, -10, -12, -12, shift=0.0)
    assert_close(mpo_loss(dpo, bco, sft, MPOWeights()), t(1.2 * math.log(2) + 2.0))
    assert 1.2 * math.log(2) == pytest.approx(0.831777, abs=1e-6)


def test_a_broadcast_of_log_probabilities_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        implicit_rewards(torch.zeros(3), torch.zeros(1), beta=0.1)


def test_shares_of_micro_batches_add_up_to_the_step():
    logps = torch.linspace(-2, -0.5, 6, dtype=torch.float64)
    totals = StepTotals(tokens=6)

    def loss(part: Tensor) -> Tensor:
        token_logps = TokenLogps(part, torch.ones(len(part), dtype=torch.int64), part.new_zeros(()))
        return token_loss(token_logps, {}, totals, LossSettings(), RewardShift()).loss

    assert_close(loss(logps[:1]) + loss(logps[1:]) + loss(logps[:0]), -logps.mean())


def test_smoothing_is_cross_entropy_with_a_spread_target():
    logits, answers = torch.tensor([[2.0, 0.0, -1.0, 0.5], [0.0, 1.0, 0.0, 3.0]]).double(), torch.tensor([0, 3])
    logps = logits.log_softmax(-1)
    smoothed = smoothed_likelihood(logps[range(2), answers], logps.mean(-1), smoothing=0.2)
    assert_close(-smoothed, torch.nn.functional.cross_entropy(logits, answers, label_smoothing=0.2, reduction="none"))
    uniform = smoothed_likelihood(t(-math.log(4)), t(-math.log(4)), smoothing=0.7)
    assert_close(uniform, t(-1.386294), atol=1e-6, rtol=0)


def test_smoothed_shares_add_up_to_the_step():
    logps, means = torch.linspace(-2, -0.5, 6, dtype=torch.float64), torch.linspace(-5, -4, 6, dtype=torch.float64)
    settings = LossSettings(label_smoothing=0.1)

    def loss(part: slice) -> Tensor:
        segments = torch.ones(len(logps[part]), dtype=torch.int64)
        token_logps = TokenLogps(logps[part], segments, logps.new_zeros(()), means[part])
        return token_loss(token_logps, {}, StepTotals(tokens=6), settings, RewardShift()).loss

    assert_close(loss(slice(0, 2)) + loss(slice(2, 6)), -(0.9 * logps + 0.1 * means).mean())


def test_router_loss_is_weighted_by_supervised_tokens():
    token_logps = TokenLogps(torch.zeros(1), torch.ones(1, dtype=torch.int64), torch.tensor(0.4))
    result = token_loss(token_logps, {}, StepTotals(tokens=4), LossSettings(), RewardShift())
    assert_close(result.loss, torch.tensor(0.1))


def test_each_stage_starts_from_the_one_before():
    previous = {name: stage.previous for name, stage in STAGES.items()}
    assert previous == {"pretrain": None, "sft": "pretrain", "mpo": "sft"}
    assert {name: stage.group_size for name, stage in STAGES.items()} == {"pretrain": 1, "sft": 1, "mpo": 2}
