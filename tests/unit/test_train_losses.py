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
    Batch,
    LossSettings,
    StepTotals,
    TrainingError,
    check_first_step,
    count_totals,
    preference_loss,
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


def test_shift_is_zero_in_the_first_step_then_the_mean_of_all_earlier_pairs():
    shift = RewardShift()
    assert shift.value == 0.0
    shift.update(reward_sum=0.1 - 0.05, num_pairs=1)
    assert shift.value == pytest.approx(0.025)
    shift.update(reward_sum=(0.15 - 0.20) * 3, num_pairs=3)
    assert shift.value == pytest.approx((0.05 - 0.15) / 8)


def test_shift_survives_a_checkpoint():
    shift, restored = RewardShift(), RewardShift()
    shift.update(0.3, 2)
    restored.load_state_dict(shift.state_dict())
    restored.update(0.1, 1)
    assert restored.value == pytest.approx(0.4 / 6)


def preference_batch(logps: Tensor) -> tuple[TokenLogps, Batch]:
    """Two pairs with 3 + 2 and 1 + 2 answer tokens."""
    segments = torch.tensor([1, 1, 1, 2, 2, 3, 4, 4])
    labels = torch.tensor([[-100, 5, 5, 5, -100, 5, 5, -100, 5, -100, 5, 5]])
    segment_ids = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4]])
    reference = torch.tensor([-2.0, -3.0, -1.0, -4.0], dtype=logps.dtype)
    batch = {"labels": labels, "segment_ids": segment_ids, "reference_logps": reference}
    return TokenLogps(logps, segments, logps.new_zeros(())), batch


def gradient(weights: MPOWeights, *, sft_token_mean: bool = False) -> Tensor:
    logps = torch.linspace(-2, -0.5, 8, dtype=torch.float64, requires_grad=True)
    token_logps, batch = preference_batch(logps)
    totals = StepTotals(*count_totals(batch).tolist())
    settings = LossSettings(0.1, weights, sft_token_mean)
    preference_loss(token_logps, batch, totals, settings, RewardShift()).loss.backward()
    assert logps.grad is not None
    return logps.grad


def test_counts_of_a_preference_batch():
    assert count_totals(preference_batch(torch.zeros(8))[1]).tolist() == [8, 2, 4]


def test_weights_one_zero_zero_are_dpo():
    logps = torch.linspace(-2, -0.5, 8, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack([logps[:3].sum(), logps[5:6].sum()])
    rejected = torch.stack([logps[3:5].sum(), logps[6:].sum()])
    margin = (chosen - t(-2, -1)) - (rejected - t(-3, -4))
    (-torch.nn.functional.logsigmoid(0.1 * margin)).mean().backward()
    assert_close(gradient(MPOWeights(1, 0, 0)), logps.grad)


def test_weights_zero_zero_one_are_sft_on_the_chosen_answers():
    assert_close(gradient(MPOWeights(0, 0, 1)), t(-1 / 6, -1 / 6, -1 / 6, 0, 0, -1 / 2, 0, 0))
    assert_close(gradient(MPOWeights(0, 0, 1), sft_token_mean=True), t(-0.25, -0.25, -0.25, 0, 0, -0.25, 0, 0))


def test_token_mean_equals_the_sft_stage_on_the_same_answers():
    logps = torch.linspace(-2, -0.5, 8, dtype=torch.float64, requires_grad=True)
    chosen = TokenLogps(logps[[0, 1, 2, 5]], torch.tensor([1, 1, 1, 3]), logps.new_zeros(()))
    token_loss(chosen, {}, StepTotals(tokens=4), LossSettings(), RewardShift()).loss.backward()
    assert_close(gradient(MPOWeights(0, 0, 1), sft_token_mean=True), logps.grad)


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


def test_metric_names_are_those_of_the_table():
    token_logps, batch = preference_batch(torch.linspace(-2, -0.5, 8))
    result = preference_loss(token_logps, batch, StepTotals(8, 2, 4), LossSettings(), RewardShift())
    assert tuple(result.metrics) == STAGES["mpo"].metric_names


def test_rewards_are_logged_unweighted():
    token_logps, batch = preference_batch(torch.full((8,), -1.0))
    metrics = preference_loss(token_logps, batch, StepTotals(8, 2, 4), LossSettings(), RewardShift()).metrics
    assert metrics["rewards/chosen"].item() == pytest.approx(0.1 * (-1 + 0) / 2)
    assert metrics["rewards/rejected"].item() == pytest.approx(0.1 * (1 + 2) / 2)
    assert metrics["rewards/accuracies"].item() == 0.0


def test_foreign_reference_is_found_at_the_first_step():
    good = {"loss/dpo": math.log(2), "loss/bco": 2 * math.log(2)}
    check_first_step(good, precision="float32")
    with pytest.raises(TrainingError, match=r"python -m jobs\.preferences"):
        check_first_step({**good, "loss/dpo": 0.71}, precision="float32")


def test_each_stage_starts_from_the_one_before():
    previous = {name: stage.previous for name, stage in STAGES.items()}
    assert previous == {"pretrain": None, "sft": "pretrain", "mpo": "sft"}
    assert {name: stage.group_size for name, stage in STAGES.items()} == {"pretrain": 1, "sft": 1, "mpo": 2}
