"""The DeepSpeed engine against a plain torch loop on one gloo rank."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from minivlm.model.checkpoint import CheckpointError
from minivlm.model.vlm import MiniVLM, cast_weights
from minivlm.train import masters
from minivlm.train.losses import RewardShift
from minivlm.train.masters import clip_gradients
from minivlm.train.optimizer import OptimizerSettings, decay_groups, learning_rate_at, muon_groups
from minivlm.train.stages import LossSettings, StepTotals, count_totals, token_loss
from tests.float32_copies import check_float32_copies
from tests.tiny_engine import SETTINGS, STEPS, make_engine, run_engine, step_batches, tiny_vlm

MUON = replace(SETTINGS, muon_learning_rate=0.02)
RESUMED = [(0, "float32"), (0, "bfloat16"), (1, "bfloat16"), (2, "float32"), (2, "bfloat16"), (3, "float32")]
pytestmark = pytest.mark.usefixtures("one_rank")


def run_plain(model: MiniVLM) -> tuple[list[float], list[float]]:
    """The same without DeepSpeed and without micro-batches' own divisors: one backward over all tokens of a step."""
    optimizer = torch.optim.AdamW(decay_groups(model.parameters(), SETTINGS.weight_decay), lr=1.0, betas=(0.9, 0.99))
    losses, norms = [], []
    for step in range(STEPS):
        loss = -torch.cat([model(batch).logps for batch in step_batches(step)]).mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip_norm)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, STEPS, SETTINGS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize(
    ("zero_stage", "offload"),
    [*((stage, "none") for stage in range(4)), (2, "optimizer"), (3, "optimizer_and_parameters")],
)
def test_every_zero_stage_equals_plain_torch(zero_stage: int, offload: str):
    model, engine = tiny_vlm(), make_engine(zero_stage, offload=offload)
    losses, norms = run_plain(model)
    engine_losses, engine_norms = run_engine(engine, range(STEPS))
    assert_close(torch.tensor(engine_losses), torch.tensor(losses), atol=1e-5, rtol=0)
    assert_close(torch.tensor(engine_norms), torch.tensor(norms), atol=1e-5, rtol=0)
    weights = engine.gather_state_dict()
    assert weights is not None
    assert_close(weights, dict(model.named_parameters()), atol=2e-5, rtol=0)


@pytest.mark.parametrize("num_lanes", [2, 3])
def test_micro_batches_side_by_side_equal_plain_torch(num_lanes: int):
    """Steps of one to four micro-batches: some lanes have nothing to do, and after a step no twin has a gradient."""
    model, engine = tiny_vlm(), make_engine(0, num_lanes=num_lanes)
    losses, norms = run_plain(model)
    engine_losses, engine_norms = run_engine(engine, range(STEPS))
    assert_close(torch.tensor(engine_losses), torch.tensor(losses), atol=1e-5, rtol=0)
    assert_close(torch.tensor(engine_norms), torch.tensor(norms), atol=1e-5, rtol=0)
    assert_close(engine.gather_state_dict(), dict(model.named_parameters()), atol=2e-5, rtol=0)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bfloat16_stays_near_float32(zero_stage: int):
    losses, _ = run_plain(tiny_vlm())
    engine_losses, _ = run_engine(make_engine(zero_stage, "bfloat16"), range(STEPS))
    assert_close(torch.tensor(engine_losses), torch.tensor(losses), atol=0.03, rtol=0)


def test_stage_0_in_bfloat16_is_a_plain_loop_with_float32_copies():
    """To the bit, and what is gathered are the copies, not the rounded weights that compute."""
    model = tiny_vlm()
    copies = {name: weights.detach().clone().requires_grad_() for name, weights in model.named_parameters()}
    groups = decay_groups(copies.values(), SETTINGS.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, SETTINGS.beta2), fused=True)
    cast_weights(model, torch.bfloat16)
    norms = []
    for step in range(STEPS):
        batches = step_batches(step)
        totals = StepTotals(sum(int(count_totals(batch)[0]) for batch in batches))
        for batch in batches:
            token_loss(model(batch), batch, totals, LossSettings(), RewardShift()).loss.backward()
        for name, weights in model.named_parameters():
            copies[name].grad, weights.grad = weights.grad.float(), None
        gradients = [torch.cat([weights.grad.flatten() for weights in group["params"]]) for group in groups]
        norms.append(float(torch.stack([gradient @ gradient for gradient in gradients]).sum().sqrt()))
        torch.nn.utils.clip_grads_with_norm_(copies.values(), SETTINGS.clip_norm, torch.tensor(norms[-1]))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, STEPS, SETTINGS)
        optimizer.step()
        for name, weights in model.named_parameters():
            weights.data.copy_(copies[name].detach())
    engine = make_engine(0, "bfloat16")
    assert run_engine(engine, range(STEPS))[1] == norms
    gathered = engine.gather_state_dict()
    assert_close(gathered, {name: weights.detach() for name, weights in copies.items()}, atol=0, rtol=0)
    assert any(not torch.equal(weights, weights.bfloat16().float()) for weights in gathered.values())


@pytest.mark.parametrize("clip_norm", [0.5, math.inf])
def test_gradients_are_clipped_together(clip_norm: float):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(size)) for size in (3, 5, 7)]
    for parameter in parameters[:2]:  # the third was not reached
        parameter.grad = torch.randn(len(parameter), generator=generator)
    before = torch.cat([parameter.grad for parameter in parameters[:2]]).clone()
    assert clip_gradients(parameters, clip_norm) == pytest.approx(float(before.norm()))
    after = torch.cat([parameter.grad for parameter in parameters[:2]])
    assert_close(after, before * min(1.0, clip_norm / float(before.norm())))
    assert parameters[2].grad.abs().sum() == 0


@pytest.mark.parametrize("clip_norm", [0.5, math.inf])
@pytest.mark.parametrize("piece", [1, 9, 100])
def test_pieces_and_clipping_of_float32_copies(clip_norm: float, piece: int, monkeypatch: pytest.MonkeyPatch):
    """However many weights are updated at a time."""
    monkeypatch.setattr(masters.MasterWeights, "piece_elements", piece)
    check_float32_copies(masters.MasterWeights, clip_norm)


def run_plain_muon(model: MiniVLM) -> dict[str, Tensor]:
    """Muon written out: momentum, Nesterov, and the update orthogonalised by `newton_schulz`; AdamW for the rest."""
    momenta: dict[str, Tensor] = {}
    adam_groups, hidden = (
        muon_groups(model.named_parameters(), MUON)[:-1],
        muon_groups(model.named_parameters(), MUON)[-1],
    )
    adam = torch.optim.AdamW([{key: group[key] for key in ("params", "weight_decay")} for group in adam_groups],
                             lr=1.0, betas=(0.9, MUON.beta2))  # fmt: skip
    chosen = {id(parameter) for parameter in hidden["params"]}
    assert {name.split(".")[-2] for name, parameter in model.named_parameters() if id(parameter) in chosen} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    for step in range(STEPS):
        loss = -torch.cat([model(batch).logps for batch in step_batches(step)]).mean()
        loss.backward()
        scale = learning_rate_at(step, STEPS, MUON) / MUON.learning_rate
        for name, parameter in model.named_parameters():
            if id(parameter) in chosen:
                assert parameter.grad is not None
                momenta[name] = momenta.get(name, torch.zeros_like(parameter)).lerp(parameter.grad, 0.05)
                update = newton_schulz(parameter.grad.lerp(momenta[name], 0.95))
                rate = scale * MUON.muon_learning_rate
                with torch.no_grad():
                    parameter.mul_(1 - rate * MUON.weight_decay).sub_(rate * update)
        for group in adam.param_groups:
            group["lr"] = learning_rate_at(step, STEPS, MUON)
        adam.step()
        model.zero_grad()
    return dict(model.named_parameters())


def newton_schulz(matrix: Tensor) -> Tensor:
    """Five quintic iterations with Jordan's coefficients, times sqrt(rows / columns) where that is above 1."""
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_muon_in_every_zero_stage_equals_muon_written_out(zero_stage: int, monkeypatch: pytest.MonkeyPatch):
    expected = run_plain_muon(tiny_vlm())
    # Else it orthogonalises in bfloat16 where the CPU has instructions for it: the same formula, rounded to 8 bits.
    monkeypatch.setattr("deepspeed.runtime.zero.muon.original_muon.ns_compute_dtype", lambda method: torch.float32)
    engine = make_engine(zero_stage, optimizer=MUON)
    run_engine(engine, range(STEPS))
    weights = engine.gather_state_dict()
    assert weights is not None
    assert_close(weights, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("optimizer", [SETTINGS, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize(("zero_stage", "precision"), RESUMED)
def test_resume_equals_uninterrupted(zero_stage: int, precision: str, optimizer: OptimizerSettings, tmp_path: Path):
    whole, first, second = (make_engine(zero_stage, precision, optimizer=optimizer) for _ in range(3))
    run_engine(whole, range(STEPS))
    run_engine(first, range(2))
    first.save(tmp_path)
    second.load(tmp_path, updates=2)
    run_engine(second, range(2, STEPS))
    assert_close(second.gather_state_dict(), whole.gather_state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("is_offloaded_first", [True, False])
@pytest.mark.parametrize(("zero_stage", "offload"), [(2, "optimizer"), (3, "optimizer_and_parameters")])
def test_state_goes_between_engines_with_and_without_offload(
    zero_stage: int, offload: str, is_offloaded_first: bool, tmp_path: Path
):
    places = (offload, "none") if is_offloaded_first else ("none", offload)
    whole, first, second = (make_engine(zero_stage, offload=where) for where in ("none", *places))
    run_engine(whole, range(STEPS))
    run_engine(first, range(2))
    first.save(tmp_path)
    second.load(tmp_path, updates=2)
    run_engine(second, range(2, STEPS))
    assert_close(second.gather_state_dict(), whole.gather_state_dict(), atol=1e-6, rtol=0)


def test_missing_state_is_an_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match="No training state"):
        make_engine(2).load(tmp_path / "nothing", updates=1)


@pytest.mark.parametrize("zero_stage", range(4))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_buffers_stay_float32(zero_stage: int, precision: str):
    """Rotary frequencies in bfloat16 turn a token at position 1000 by 0.18 rad, and exports have exact ones."""
    engine = make_engine(zero_stage, precision)
    buffers = dict(engine.module.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_what_no_micro_batch_reaches_decays_and_is_saved(zero_stage: int, precision: str, tmp_path: Path):
    model = tiny_vlm()
    model.projector.register_parameter("spare", nn.Parameter(torch.ones(4, 4)))
    engine = make_engine(zero_stage, precision, model)
    run_engine(engine, range(STEPS))
    rates = [learning_rate_at(step, STEPS, SETTINGS) for step in range(STEPS)]
    expected = math.prod(1 - rate * SETTINGS.weight_decay for rate in rates)
    spare = engine.gather_state_dict()["projector.spare"]
    assert_close(spare, torch.full((4, 4), expected))
    engine.save(tmp_path)
    engine.load(tmp_path, updates=STEPS)
    assert torch.equal(engine.gather_state_dict()["projector.spare"], spare)


@pytest.mark.parametrize("zero_stage", range(4))
def test_frozen_language_model_stays_and_is_gathered(zero_stage: int):
    model = tiny_vlm()
    model.language_model.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = make_engine(zero_stage, model=model)
    run_engine(engine, range(STEPS))
    after = engine.gather_state_dict()
    assert after is not None
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"projector"}


def test_muon_follows_the_same_schedule():
    engine = make_engine(2, optimizer=replace(MUON, schedule="wsd", decay_fraction=0.5, warmup_fraction=0.0))
    rates = []
    for step in range(STEPS):
        run_engine(engine, range(step, step + 1))
        rates.append({group["lr"] for group in engine._engine.optimizer.param_groups})
    decayed = 1 - 0.5**0.5
    assert rates[:3] == [{1e-2, 0.02}] * 3
    assert sorted(rates[3]) == pytest.approx([1e-2 * decayed, 0.02 * decayed])


def test_mean_log_probabilities_are_those_of_the_whole_vocabulary():
    model, batch = tiny_vlm(), step_batches(0)[0]
    assert model(batch).mean_logps is None
    model.returns_mean_logps = True
    assert model.eval()(batch).mean_logps is None
    seen: list[Tensor] = []
    head = model.language_model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    output = model.train()(batch)
    assert output.mean_logps is not None
    assert_close(output.mean_logps, seen[0][: len(output.logps)].log_softmax(-1).mean(-1))


def test_only_matrices_decay():
    model = tiny_vlm()
    decayed, spared = decay_groups(model.parameters(), 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {parameter.ndim for parameter in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_resamplers_queries_train_as_in_plain_torch(zero_stage):
    """They belong to no layer of their own, and a step without pictures must still reach them on every rank."""
    plain, engine = tiny_vlm("resampler"), make_engine(zero_stage, model=tiny_vlm("resampler"))
    before = plain.projector.queries.detach().clone()
    expected, _ = run_plain(plain)
    losses, _ = run_engine(engine, range(STEPS))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert not torch.equal(plain.projector.queries, before)
    assert_close(engine.gather_state_dict()["projector.queries"], plain.projector.queries.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("optimizer", [SETTINGS, MUON], ids=["adamw", "muon"])
def test_a_resampler_trains_in_bfloat16(zero_stage, optimizer):
    """Engines cast its parameters, but not the positions that it adds to the features."""
    expected, _ = run_plain(tiny_vlm("resampler"))
    losses, _ = run_engine(make_engine(zero_stage, "bfloat16", tiny_vlm("resampler"), optimizer), range(STEPS))
    assert_close(torch.tensor(losses), torch.tensor(expected), atol=0.03, rtol=0)
