"""Attention sample by sample gives what torch's own attention gives under a mask, whatever lies beside a sample."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minivlm.model import fast_layers, read_tokens
from minivlm.model.language import build_language_model
from minivlm.model.lora import decoder_layers
from minivlm.model.projector import build_projector
from minivlm.model.segments import line_length, segment_layouts
from minivlm.model.vlm import MiniVLM, TokenLogps, cast_weights, document_mask
from tests.sample_lines import LENGTHS, line_of, states
from tests.tiny_export import SIZES


def layer(model_type: str = "llama", *, training: bool = True) -> nn.Module:
    """What the attention reads of a stock attention module."""
    module = nn.Identity().train(training)
    module.config = type("Config", (), {"model_type": model_type})()
    module.num_key_value_groups = 2
    return module


def attend(
    segment_ids: Tensor, inputs: list[Tensor], module: nn.Module | None = None, dropout: float = 0.0, longest: int = 0
) -> Tensor:
    """By products up to `longest` tokens, else by the stock function."""
    found, weights = fast_layers.segment_attention(
        module or layer(),
        *inputs,
        None,
        layouts=segment_layouts(segment_ids, (4, 2), longest),
        scaling=0.3,
        dropout=dropout,
    )
    assert weights is None
    return found


def expected(segment_ids: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """By torch's function in float64 under a mask, zeros for padding: [1, M, H, D]."""
    key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    mask = document_mask(segment_ids, torch.float64)
    tensors = [tensor.double() for tensor in (query, key, value)]
    mixed = nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=0.3).transpose(1, 2)
    return mixed * (segment_ids != 0).view(1, -1, 1, 1)


@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6), padding=st.integers(0, 5), heads=st.integers(1, 3))
@settings(max_examples=25)
def test_what_is_taken_apart_comes_together_again(lengths: list[int], padding: int, heads: int) -> None:
    segment_ids = line_of(tuple(lengths), padding)
    others, layout = segment_layouts(segment_ids, (heads, 1), 0)
    assert layout is not None
    assert others is None
    whole = torch.randn(1, heads, segment_ids.numel(), 4, requires_grad=True)
    parts = layout.split(whole, layout.query)
    assert [(part.shape[0], part.shape[2]) for part in parts] == layout.groups
    assert sum(count for count, _ in layout.groups) == len(lengths)
    assert all(width % 32 == 0 for _, width in layout.groups)
    joined = layout.join(parts)
    wanted = whole.transpose(1, 2) * (segment_ids != 0).view(1, -1, 1, 1)
    assert torch.equal(joined, wanted)
    weight = torch.randn_like(joined)
    (gradient,) = torch.autograd.grad((joined * weight).sum(), whole)
    assert torch.equal(gradient, (weight * (segment_ids != 0).view(1, -1, 1, 1)).transpose(1, 2))


@pytest.mark.parametrize(
    ("longest", "dtype", "tolerance"),
    [
        (0, torch.float32, 1e-6),
        (0, torch.bfloat16, 3e-2),
        (32, torch.bfloat16, 3e-2),
        (64, torch.bfloat16, 3e-2),
        (64, torch.float32, 1e-6),
    ],
)
def test_values_and_gradients_are_those_of_attention(longest: int, dtype: torch.dtype, tolerance: float) -> None:
    segment_ids = line_of(LENGTHS)
    inputs = [tensor.requires_grad_() for tensor in states(segment_ids.numel(), dtype)]
    found = attend(segment_ids, inputs, longest=longest)
    assert found.dtype == dtype
    reference = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = expected(segment_ids, *reference)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)
    found.double().square().sum().backward()
    wanted.square().sum().backward()
    for tensor, exact in zip(inputs, reference, strict=True):
        scale = float(exact.grad.abs().max())
        torch.testing.assert_close(tensor.grad.double(), exact.grad, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(("longest", "dtype"), [(0, torch.float32), (0, torch.bfloat16), (64, torch.bfloat16)])
def test_a_sample_does_not_see_another_to_the_bit(longest: int, dtype: torch.dtype) -> None:
    segment_ids = line_of(LENGTHS)
    before = states(segment_ids.numel(), dtype)
    is_changed = segment_ids[0] == 2
    after = [tensor.clone() for tensor in before]
    for tensor in after:
        tensor[:, :, is_changed] = float("nan")
        tensor[:, :, segment_ids[0] == 0] = -7.0
    weight = torch.randn(1, segment_ids.numel(), 4, 8).to(dtype)
    results = []
    for inputs in (before, after):
        leaves = [tensor.requires_grad_() for tensor in inputs]
        found = attend(segment_ids, leaves, longest=longest)
        results.append([found.transpose(1, 2), *torch.autograd.grad(found, leaves, weight)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first[:, :, ~is_changed], second[:, :, ~is_changed])
        assert second[:, :, is_changed].isnan().any()


def test_only_long_samples_take_the_stock_function(monkeypatch: pytest.MonkeyPatch) -> None:
    segment_ids = line_of(LENGTHS)
    inputs = states(segment_ids.numel(), torch.bfloat16)
    short = attend(segment_ids, inputs, longest=64)
    shapes, original = [], fast_layers.sdpa_attention_forward
    monkeypatch.setattr(
        fast_layers,
        "sdpa_attention_forward",
        lambda module, query, *args, **kwargs: (
            shapes.append(query.shape[:3]) or original(module, query, *args, **kwargs)
        ),
    )
    long = attend(segment_ids, inputs, longest=32)
    assert shapes == [(3, 4, 64)]
    torch.testing.assert_close(long, short, rtol=0, atol=3e-2)


def test_weights_are_dropped() -> None:
    segment_ids = line_of(LENGTHS)
    inputs = states(segment_ids.numel())
    torch.manual_seed(0)
    assert not torch.allclose(attend(segment_ids, inputs), attend(segment_ids, inputs, dropout=0.5))


@pytest.mark.parametrize(
    ("architecture", "changes", "longest"),
    [
        ("llama", {}, 512),
        ("llama", {"attention_dropout": 0.1}, 0),
        ("llama", {"attention_bias": True}, 0),
        ("qwen2", {}, 0),
        ("qwen3", {}, 512),
    ],
)
def test_products_have_no_dropout_and_biased_scores_are_not_rounded(
    architecture: str, changes: dict, longest: int
) -> None:
    vlm = small_vlm(architecture, **changes)
    fast_layers.use_segment_attention(vlm)
    assert vlm.longest_product == longest


def small_vlm(architecture: str, **changes: object) -> MiniVLM:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes = SIZES | heads | {"num_hidden_layers": 2, "initializer_range": 0.3}
    model = build_language_model(path=None, architecture=architecture, sizes=sizes, vocab_size=64, seed=0)
    for name, value in changes.items():
        setattr(model.config, name, value)
    return MiniVLM(build_projector("linear", 8, sizes["hidden_size"]), model, image_token_id=3).eval()


def differentiate(vlm: MiniVLM, batch: dict[str, Tensor]) -> tuple[TokenLogps, dict[str, Tensor]]:
    vlm.zero_grad()
    output = vlm(batch)
    (output.logps.sum() + output.aux_loss).backward()
    gradients = {name: weights.grad.float() for name, weights in vlm.named_parameters()}
    return output._replace(logps=output.logps.detach()), gradients


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        *((name, dtype) for name in ("llama", "qwen2", "qwen3") for dtype in (torch.float32, torch.bfloat16)),
        ("qwen3_moe", torch.float32),  # in bfloat16 a rounded state may choose another expert
    ],
)
def test_a_stock_model_computes_the_same(architecture: str, dtype: torch.dtype, make_rows: Callable[..., dict]) -> None:
    vlm, batch = small_vlm(architecture), make_rows()
    cast_weights(vlm, dtype)
    before, gradients = differentiate(vlm, batch)
    fast_layers.use_segment_attention(vlm)
    after, found = differentiate(vlm, batch)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(after.logps, before.logps, rtol=0, atol=tolerance * float(before.logps.abs().max()))
    assert torch.equal(after.segments, before.segments)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=tolerance * float(gradient.abs().max() + 1e-6))
    assert fast_layers.NAME not in vlm.language_model.config.to_json_string()
    embeds = torch.randn(2, 9, vlm.language_model.config.hidden_size, dtype=dtype)
    decoder = vlm.language_model.get_decoder()
    found = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state  # as generation reads a prompt
    vlm.language_model.set_attn_implementation("sdpa")
    assert torch.equal(found, decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state)


@pytest.mark.parametrize(("architecture", "is_whole"), [("llama", False), ("qwen3", False), ("qwen3_moe", True)])
def test_the_last_layer_computes_only_what_is_read(
    architecture: str, is_whole: bool, make_rows: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_tokens, "line_length", lambda num_tokens: num_tokens + 3)
    vlm, batch, seen = small_vlm(architecture), make_rows(), []
    fast_layers.use_segment_attention(vlm)
    last = decoder_layers(vlm.language_model)[-1]
    for part in (last.self_attn.q_proj, last.self_attn.k_proj, last.self_attn.o_proj, last.mlp):
        part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    num_read, num_tokens = len(vlm(batch).logps), int((batch["segment_ids"] != 0).sum())
    tails = 0 if is_whole else 2 + 1 + 5  # of the first, second and last sample
    few, all_of_them = num_read + 3, line_length(num_tokens - tails)
    assert seen == [all_of_them] * 4 if is_whole else [few, all_of_them, few, few]
    assert vlm(batch | {"labels": torch.full_like(batch["labels"], -100)}).logps.shape == (0,)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_every_layer_is_checkpointed(architecture: str, make_rows: Callable[..., dict]) -> None:
    vlm, batch, seen = small_vlm(architecture).train(), make_rows(), []
    fast_layers.use_segment_attention(vlm)
    plain, gradients = differentiate(vlm, batch)
    vlm.language_model.activation_checkpointing_enable({"use_reentrant": False})
    layers = decoder_layers(vlm.language_model)
    for place, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(lambda _, inputs, place=place: seen.append(place))
    again, found = differentiate(vlm, batch)
    assert sorted(seen) == sorted([*range(len(layers))] * 2)
    assert torch.equal(again.logps, plain.logps)
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize(
    ("architecture", "changes", "is_known"),
    [("llama", {}, True), ("qwen2", {"use_sliding_window": True}, False), ("llama", {"model_type": "gemma2"}, False)],
)
def test_models_that_need_more_keep_rows_and_a_mask(architecture: str, changes: dict, is_known: bool) -> None:
    vlm = small_vlm(architecture, **changes)
    own = vlm.language_model.config._attn_implementation
    fast_layers.use_segment_attention(vlm)
    assert vlm.attends_by_segment == is_known
    assert vlm.language_model.config._attn_implementation == (fast_layers.NAME if is_known else own)


@pytest.fixture
def make_rows() -> Callable[..., dict]:
    """Two rows of two samples each, with gaps and ends that are not learned, and padding; the third, which has no
    label, and the first have a picture of four tokens."""

    def make() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        segment_ids = torch.tensor([[1] * 9 + [2] * 8 + [0] * 3, [3] * 4 + [4] * 13 + [0] * 3])
        input_ids = torch.randint(4, 60, (2, 20), generator=generator)
        input_ids[0, 2:6] = 3
        input_ids[1, 0:4] = 3
        labels = input_ids.clone()
        labels[0, [0, 1, 2, 3, 4, 5, 8, 9, 12]] = -100
        labels[1, [0, 1, 2, 3, 4, 8, 13, 14, 15, 16]] = -100
        starts = [0, 9, 0, 4]
        positions = torch.tensor([[*range(9), *range(8), 0, 0, 0], [*range(4), *range(13), 0, 0, 0]])
        assert all(int(positions[number // 2, start]) == 0 for number, start in enumerate(starts))
        return {
            "input_ids": input_ids,
            "labels": labels.masked_fill(segment_ids == 0, -100),
            "position_ids": positions,
            "segment_ids": segment_ids,
            "image_features": torch.randn(2, 4, 8, generator=generator).bfloat16(),
            "image_index": torch.tensor([1, 0]),
        }

    return make
