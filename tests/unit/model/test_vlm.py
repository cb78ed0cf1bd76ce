"""The forward pass: packing, padding, isolation of samples, empty micro-batches, precision."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from minivlm.model.fast_layers import use_segment_attention
from minivlm.model.vlm import TokenLogps, count_parameters, document_mask, load_balancing_loss, sequence_logps


@pytest.fixture(params=[False, True], ids=["rows", "segments"])
def make_vlm(make_vlm, request):
    """Models that attend over rows under a mask, and sample by sample."""

    def make(*args, **kwargs):
        vlm = make_vlm(*args, **kwargs)
        if request.param:
            use_segment_attention(vlm)
        return vlm

    return make


few_examples = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2)), min_size=2, max_size=4),
    padding=st.integers(0, 9),
)
@few_examples
def test_packing_and_padding_never_change_logps(make_vlm, make_segment, make_batch, shapes, padding):
    vlm = make_vlm()
    segments = [make_segment(seed, *shape) for seed, shape in enumerate(shapes)]
    total = sum(len(ids) for ids, _, _ in segments)
    with torch.no_grad():
        packed = vlm(make_batch([segments], total + padding))
        alone = [vlm(make_batch([[segment]])).logps for segment in segments]
    assert_close(packed.logps, torch.cat(alone), atol=2e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_changing_sample_a_leaves_sample_b_bit_equal(make_vlm, make_segment, make_batch, architecture):
    vlm = make_vlm(architecture)
    b = make_segment(7, 5, 6)
    with torch.no_grad():
        first = vlm(make_batch([[make_segment(1), b], [make_segment(3)]]))
        second = vlm(make_batch([[make_segment(2), b], [make_segment(4)]]))
    assert not torch.equal(first.logps[first.segments == 1], second.logps[second.segments == 1])
    assert torch.equal(first.logps[first.segments == 2], second.logps[second.segments == 2])


def test_picture_changes_the_answer(make_vlm, make_segment, make_batch):
    vlm = make_vlm()
    ids, labels, features = make_segment(0)
    with torch.no_grad():
        first = vlm(make_batch([[(ids, labels, features)]]))
        second = vlm(make_batch([[(ids, labels, features.flip(1))]]))
    assert (first.logps - second.logps).abs().max() > 1e-3


def test_image_index_shares_one_picture_between_chosen_and_rejected(make_vlm, make_segment, make_batch):
    vlm = make_vlm()
    ids, labels, features = make_segment(0)
    twice = make_batch([[(ids, labels, features), (ids, labels, features)]])
    shared = twice | {"image_features": features, "image_index": torch.tensor([0, 0])}
    with torch.no_grad():
        assert torch.equal(vlm(twice).logps, vlm(shared).logps)


def test_logps_are_those_of_a_full_forward(make_vlm, make_segment, make_batch):
    vlm = make_vlm("llama", tied=False)
    ids, labels, _ = make_segment(0, 4, 3, 0)
    batch = make_batch([[(ids, labels, torch.zeros(0, 5, 32, dtype=torch.bfloat16))]])
    with torch.no_grad():
        logits = vlm.language_model(input_ids=batch["input_ids"]).logits[0]
        expected = [logits.log_softmax(-1)[t - 1, ids[t]] for t in (4, 5, 6)]
        assert_close(vlm(batch).logps, torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_answer_tokens", [0, 1, 15, 16, 17, 65])
def test_the_head_sees_few_shapes_whatever_is_supervised(make_vlm, make_segment, make_batch, num_answer_tokens):
    """oneDNN compiles a kernel for each and keeps it: memory grew by 10 MB a step."""
    vlm, seen = make_vlm(), []
    head = vlm.language_model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    found = vlm(make_batch([[make_segment(0, 3, num_answer_tokens, 1)]]))
    assert len(found.logps) == num_answer_tokens
    assert seen == [max(16, math.ceil(num_answer_tokens / 16) * 16)]


@pytest.mark.parametrize("num_answer_tokens", [0, 5])
def test_rows_that_fill_the_shape_change_neither_values_nor_gradients(
    make_vlm, make_segment, make_batch, num_answer_tokens, monkeypatch
):
    batch, found = make_batch([[make_segment(0, 3, num_answer_tokens, 1)]]), []
    for length in (64, max(1, num_answer_tokens)):
        monkeypatch.setattr("minivlm.model.read_tokens.line_length", lambda _, length=length: length)
        vlm = make_vlm()
        vlm.returns_mean_logps = True
        output = vlm.train()(batch)
        (output.logps.sum() + output.mean_logps.square().sum()).backward()
        found.append([output.logps, output.mean_logps, *(weights.grad for weights in vlm.parameters())])
    for filled, exact in zip(*found, strict=True):
        assert_close(filled, exact, atol=1e-6, rtol=1e-5)


def test_sequence_logps_sum_per_segment():
    token_logps = TokenLogps(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([1, 3, 1]), torch.zeros(()))
    assert sequence_logps(token_logps, 3).tolist() == [-5.0, 0.0, -2.0]


def test_document_mask_keeps_segments_apart_and_padding_finite():
    mask = document_mask(torch.tensor([[1, 1, 2, 0, 0]]), torch.float32)
    looks = (mask[0, 0] == 0).int().tolist()
    assert looks == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_zero_weight_micro_batch_reaches_every_parameter_with_zero_gradient(make_vlm, make_batch, architecture):
    vlm = make_vlm(architecture)
    result = vlm(make_batch([[]], 4))
    (result.logps.sum() + sequence_logps(result, 0).sum() + result.aux_loss).backward()
    assert result.logps.shape == (0,)
    for name, parameter in vlm.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() == 0, name


def test_text_only_batch_still_reaches_the_projector(make_vlm, make_segment, make_batch):
    vlm = make_vlm()
    vlm.language_model.requires_grad_(False)
    vlm(make_batch([[make_segment(0, num_pictures=0)]])).logps.sum().backward()
    assert all(parameter.grad is not None for parameter in vlm.projector.parameters())


def test_every_parameter_learns(make_vlm, make_segment, make_batch):
    vlm = make_vlm()
    vlm(make_batch([[make_segment(0), make_segment(1)]])).logps.sum().backward()
    assert [name for name, parameter in vlm.named_parameters() if not parameter.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_bfloat16_weights_give_float32_logps(make_vlm, make_segment, make_batch, architecture):
    batch = make_batch([[make_segment(0), make_segment(1)]])
    with torch.no_grad():
        exact = make_vlm(architecture)(batch)
        rounded = make_vlm(architecture).bfloat16()(batch)
    assert rounded.logps.dtype == torch.float32
    assert_close(rounded.logps, exact.logps, atol=0.3, rtol=0.1)


def test_placeholders_unlike_pictures_are_refused(make_vlm, make_segment, make_batch):
    batch = make_batch([[make_segment(0)]])
    with pytest.raises(ValueError, match="5 image tokens for 0 pictures"):
        make_vlm()(batch | {"image_index": torch.zeros(0, dtype=torch.int64)})


def test_router_loss_is_that_of_transformers(make_vlm, make_segment, make_batch):
    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(10, 4, generator=generator) for _ in range(3))
    is_token = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    expected = load_balancing_loss_func(logits, 4, 2, is_token)
    assert_close(load_balancing_loss(logits, is_token == 1, 2), expected)


def test_even_routing_has_router_loss_of_top_k():
    logits = (torch.tensor([[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]]),)
    loss = load_balancing_loss(logits, torch.ones(1, 2, dtype=torch.bool), 2)
    assert math.isclose(loss.item(), 2.0, rel_tol=1e-6)


def test_only_a_mixture_of_experts_has_a_router_loss(make_vlm, make_segment, make_batch):
    batch = make_batch([[make_segment(0)]])
    with torch.no_grad():
        assert make_vlm("qwen3")(batch).aux_loss.item() == 0.0
        # Every loss is at least coefficient x top_k where choices and probabilities agree.
        assert 0.01 < make_vlm("qwen3_moe")(batch).aux_loss.item() < 0.01 * 4 * 2


def test_padding_does_not_change_the_router_loss(make_vlm, make_segment, make_batch):
    vlm = make_vlm("qwen3_moe")
    rows = [[make_segment(0)]]
    with torch.no_grad():
        assert_close(vlm(make_batch(rows)).aux_loss, vlm(make_batch(rows, 30)).aux_loss)


def test_tied_head_counts_once(make_vlm):
    tied, untied = (count_parameters(make_vlm(tied=tied)) for tied in (True, False))
    assert untied["language_model"] - tied["language_model"] == 320 * 64
    assert tied["projector"] == 32 * 64 + 64 + 64 * 64 + 64
