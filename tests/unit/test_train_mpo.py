"""MPO as one code path: its weights give DPO, BCO and SFT, its metrics and its shift do not depend on the layout."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from minivlm.data.collate import collate
from minivlm.data.plan import plan_epoch
from minivlm.data.tokens import IGNORE, EncodedSample, TokenTable
from minivlm.model.language import build_language_model
from minivlm.model.vlm import MiniVLM, TokenLogps
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
from minivlm.train.stages import (
    STAGES,
    Batch,
    LossSettings,
    StageLoss,
    StepTotals,
    TrainingError,
    check_first_step,
    count_totals,
    preference_loss,
    token_loss,
)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    "loss",
    [
        lambda chosen, rejected: dpo_loss(*rewards_of(chosen, rejected)),
        lambda chosen, rejected: bco_loss(*rewards_of(chosen, rejected), shift=0.2),
        lambda chosen, rejected: generation_loss(chosen, t(3, 1, 5)),
        lambda chosen, rejected: smoothed_likelihood(chosen, rejected, smoothing=0.1),
        lambda chosen, rejected: mpo_loss(
            dpo_loss(*rewards_of(chosen, rejected)),
            bco_loss(*rewards_of(chosen, rejected), shift=-0.1),
            generation_loss(chosen, t(3, 1, 5)),
            MPOWeights(),
        ),
    ],
    ids=["dpo", "bco", "sft", "smoothed", "mpo"],
)
def test_gradients_are_those_of_finite_differences(loss: Callable[[Tensor, Tensor], Tensor]):
    generator = torch.Generator().manual_seed(0)
    inputs = [(-20 * torch.rand(3, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(loss, inputs)


def rewards_of(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    reference = t(-9, -12, -5)
    return implicit_rewards(chosen, reference, beta=0.3), implicit_rewards(rejected, reference, beta=0.3)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_shift_does_not_depend_on_the_number_of_workers(world_size: int):
    """As the loop does it: the metrics of all ranks and micro-batches add up, then there is one update."""
    shift, seen = RewardShift(), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        logps, reference = -10 * torch.rand(2, 16, 2, generator=generator, dtype=torch.float64)
        total = 0.0
        for rank in range(world_size):
            for pairs in torch.arange(rank, 16, world_size).split(3):
                batch = answers(logps[pairs], reference[pairs] - 3)
                metrics = preference_loss(*batch, StepTotals(32, 16, 16), LossSettings(), shift).metrics
                total += float(metrics["rewards/chosen"] + metrics["rewards/rejected"])
        shift.update(total * 16, 16)
        seen.append(0.1 * (logps - reference + 3).flatten())
        assert shift.value == pytest.approx(float(torch.cat(seen).mean()), abs=1e-12)
    assert shift.value > 0.1


def answers(logps: Tensor, reference: Tensor) -> tuple[TokenLogps, Batch]:
    """A micro-batch of pairs [n, 2] whose answers have one token each."""
    token_logps = TokenLogps(logps.flatten(), torch.arange(1, logps.numel() + 1), logps.new_zeros(()))
    return token_logps, {"reference_logps": reference.flatten()}


def preference_batch(logps: Tensor) -> tuple[TokenLogps, Batch]:
    """Two pairs with 3 + 2 and 1 + 2 answer tokens."""
    segments = torch.tensor([1, 1, 1, 2, 2, 3, 4, 4])
    labels = torch.tensor([[-100, 5, 5, 5, -100, 5, 5, -100, 5, -100, 5, 5]])
    segment_ids = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4]])
    reference = torch.tensor([-2.0, -3.0, -1.0, -4.0], dtype=logps.dtype)
    batch = {"labels": labels, "segment_ids": segment_ids, "reference_logps": reference}
    return TokenLogps(logps, segments, logps.new_zeros(())), batch


def step_loss(logps: Tensor, weights: MPOWeights, *, sft_token_mean: bool = False, shift: float = 0.0) -> StageLoss:
    token_logps, batch = preference_batch(logps)
    totals = StepTotals(*count_totals(batch).tolist())
    level = RewardShift()
    level.update(shift * 2, 1)
    return preference_loss(token_logps, batch, totals, LossSettings(0.1, weights, sft_token_mean), level)


def gradient(weights: MPOWeights, *, sft_token_mean: bool = False, shift: float = 0.0) -> Tensor:
    logps = torch.linspace(-2, -0.5, 8, dtype=torch.float64, requires_grad=True)
    step_loss(logps, weights, sft_token_mean=sft_token_mean, shift=shift).loss.backward()
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


def test_weights_zero_one_zero_are_bco():
    logps = torch.linspace(-2, -0.5, 8, dtype=torch.float64, requires_grad=True)
    chosen = 0.1 * (torch.stack([logps[:3].sum(), logps[5:6].sum()]) - t(-2, -1))
    rejected = 0.1 * (torch.stack([logps[3:5].sum(), logps[6:].sum()]) - t(-3, -4))
    logsigmoid = torch.nn.functional.logsigmoid
    (-logsigmoid(chosen - 0.3) - logsigmoid(0.3 - rejected)).mean().backward()
    assert_close(gradient(MPOWeights(0, 1, 0), shift=0.3), logps.grad)


def test_weights_zero_zero_one_are_sft_on_the_chosen_answers():
    assert_close(gradient(MPOWeights(0, 0, 1)), t(-1 / 6, -1 / 6, -1 / 6, 0, 0, -1 / 2, 0, 0))
    assert_close(gradient(MPOWeights(0, 0, 1), sft_token_mean=True), t(-0.25, -0.25, -0.25, 0, 0, -0.25, 0, 0))


def test_token_mean_equals_the_sft_stage_on_the_same_answers():
    logps = torch.linspace(-2, -0.5, 8, dtype=torch.float64, requires_grad=True)
    chosen = TokenLogps(logps[[0, 1, 2, 5]], torch.tensor([1, 1, 1, 3]), logps.new_zeros(()))
    token_loss(chosen, {}, StepTotals(tokens=4), LossSettings(), RewardShift()).loss.backward()
    assert_close(gradient(MPOWeights(0, 0, 1), sft_token_mean=True), logps.grad)


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.8, 0.2, 1.0)])
def test_loss_and_gradient_are_the_weighted_sum_of_the_terms(weights: tuple[float, float, float]):
    single = [gradient(MPOWeights(*unit), shift=0.3) for unit in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    expected = sum(weight * term for weight, term in zip(weights, single, strict=True))
    assert_close(gradient(MPOWeights(*weights), shift=0.3), expected)
    metrics = step_loss(torch.linspace(-2, -0.5, 8), MPOWeights(*weights)).metrics
    terms = [float(metrics[name]) for name in ("loss/dpo", "loss/bco", "loss/sft")]
    assert float(metrics["loss"]) == pytest.approx(sum(w * v for w, v in zip(weights, terms, strict=True)), rel=1e-6)


@pytest.mark.parametrize(
    ("weights", "broken"), [((1, 0, 1), (0, 1, 0)), ((0, 1, 1), (1, 0, 0)), ((1, 1, 0), (0, 0, 1))]
)
def test_a_term_of_weight_zero_cannot_spoil_the_sum(weights: tuple[int, ...], broken: tuple[int, ...]):
    terms = [torch.tensor([math.inf if is_broken else 1.0], requires_grad=True) for is_broken in broken]
    loss = mpo_loss(*terms, MPOWeights(*weights))
    loss.sum().backward()
    assert loss.tolist() == [2.0]
    assert [term.grad is None for term in terms] == [bool(is_broken) for is_broken in broken]


def test_a_loss_without_terms_is_refused():
    with pytest.raises(ValueError, match="all weights are 0"):
        MPOWeights(0, 0, 0)


def test_sft_on_chosen_alone_still_finds_a_foreign_reference():
    metrics = step_loss(torch.full((8,), -1.0), MPOWeights(0, 0, 1)).metrics  # rewards -.1, .1, 0, .2
    assert float(metrics["rewards/margins"]) == pytest.approx(-0.2)
    with pytest.raises(TrainingError, match="loss/dpo is"):
        check_first_step({name: float(value) for name, value in metrics.items()}, precision="float32")


def test_divergence_from_the_reference_is_schulmans_k3():
    found = reference_kl(t(-3, -1, -2), t(-2, -1, -4))
    assert_close(found, t(math.exp(-1), 0.0, math.exp(2) - 3))
    probabilities, reference = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    divergence = (reference * (reference / probabilities).log()).sum()
    assert_close((reference * reference_kl(probabilities.log(), reference.log())).sum(), divergence)


def test_an_answer_that_became_impossible_gives_a_finite_divergence():
    assert reference_kl(torch.tensor([-500.0]), torch.tensor([-1.0])).item() == pytest.approx(498.0)


def test_lengths_and_divergence_are_means_over_all_answers_of_the_step():
    metrics = step_loss(torch.full((8,), -1.0), MPOWeights()).metrics
    assert (metrics["length/chosen"].item(), metrics["length/rejected"].item()) == (2.0, 2.0)  # 3 + 1, 2 + 2 tokens
    ratios = [-1.0, 1.0, 0.0, 2.0]
    assert metrics["kl"].item() == pytest.approx(sum(math.exp(d) - 1 - d for d in ratios) / 4)


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
    with pytest.raises(TrainingError, match=r"Delete reference\.json .*python -m jobs\.preferences"):
        check_first_step({**good, "loss/dpo": 0.71}, precision="float32")


def test_shift_survives_a_checkpoint():
    shift, restored = RewardShift(), RewardShift()
    shift.update(0.3, 2)
    restored.load_state_dict(shift.state_dict())
    restored.update(0.1, 1)
    assert restored.value == pytest.approx(0.4 / 6)


def test_shift_is_zero_in_the_first_step_then_the_mean_of_all_earlier_pairs():
    shift = RewardShift()
    assert shift.value == 0.0
    shift.update(reward_sum=0.1 - 0.05, num_pairs=1)
    assert shift.value == pytest.approx(0.025)
    shift.update(reward_sum=(0.15 - 0.20) * 3, num_pairs=3)
    assert shift.value == pytest.approx((0.05 - 0.15) / 8)


def test_a_pairs_picture_is_read_and_projected_once(tmp_path: Path):
    """Chosen and rejected answer show it, and are in one micro-batch whatever the layout."""
    image, num_pairs, width = 50, 11, 16
    generator = np.random.default_rng(0)
    entries = []
    for index in range(2 * num_pairs):
        ids = np.concatenate([[image] * 3, generator.integers(1, 50, 4 + index % 7)]).astype(np.int32)
        labels = np.where(np.arange(len(ids)) > 4, ids, IGNORE).astype(np.int32)
        entries.append(EncodedSample(str(index), ids, labels, (f"{index // 2:064x}",)))
    table = TokenTable.write(tmp_path / "table", entries, group_size=2, reference_logps=[0.0] * len(entries))
    asked: list[str] = []

    def features(digests: tuple[str, ...]) -> Tensor:
        asked.extend(digests)
        return torch.randn(len(digests), 3, width)

    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    sizes |= {"head_dim": width, "intermediate_size": 16, "rope_theta": 1e4}
    language = build_language_model(path=None, architecture="llama", sizes=sizes, vocab_size=60, seed=0)
    model = MiniVLM(torch.nn.Linear(width, width), language, image)
    projected: list[int] = []
    model.projector.register_forward_hook(lambda module, inputs, output: projected.append(len(output)))
    plan = plan_epoch(
        table.lengths, group_size=2, seed=0, epoch=0, global_batch_size=4, world_size=2, micro_batch_tokens=48,
        pack_length=24,
    )  # fmt: skip
    micro_batches = [rows for step in plan for rows in step.micro_batches]
    for rows in micro_batches:
        model(collate(table, rows, features, image_token_id=image, pad_token_id=0))
    assert len([rows for rows in micro_batches if rows]) > len(plan)  # several per step
    assert sorted(asked) == sorted(table.digests)
    assert sum(projected) == num_pairs
