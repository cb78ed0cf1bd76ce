"""Attention by matrix products gives what torch's own attention gives, and keeps samples of a row apart."""

import pytest
import torch
from torch import Tensor, nn

from minivlm.model import fast_layers
from minivlm.model.language import build_language_model
from minivlm.model.vlm import document_mask
from tests.tiny_export import SIZES

SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0], [3, 3, 3, 3, 3, 3, 0, 0], [4, 5, 5, 6, 6, 6, 6, 6]])


def states(dtype: torch.dtype) -> list[Tensor]:
    """Queries of four heads, keys and values of two, laid out as a projection leaves them."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 8, heads, 8, generator=generator).to(dtype).transpose(1, 2) for heads in (4, 2, 2)]


def expected(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """By torch's function in float64: [B, T, H, D]."""
    key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    mask = document_mask(SEGMENTS, torch.float64)
    tensors = [tensor.double() for tensor in (query, key, value)]
    return nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=0.3).transpose(1, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_values_and_gradients_are_those_of_attention(dtype: torch.dtype, tolerance: float) -> None:
    inputs = [tensor.requires_grad_() for tensor in states(dtype)]
    found, weights = fast_layers.matrix_attention(nn.Identity(), *inputs, document_mask(SEGMENTS, dtype), scaling=0.3)
    assert weights is None
    assert found.dtype == dtype
    reference = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = expected(*reference)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)
    found.double().square().sum().backward()
    wanted.square().sum().backward()
    for tensor, exact in zip(inputs, reference, strict=True):
        scale = float(exact.grad.abs().max())
        torch.testing.assert_close(tensor.grad.double(), exact.grad, rtol=0, atol=tolerance * scale)


def test_samples_of_a_row_do_not_see_each_other_to_the_bit() -> None:
    mask = document_mask(SEGMENTS, torch.bfloat16)
    before = states(torch.bfloat16)
    after = [tensor.clone() for tensor in before]
    for tensor in after:
        tensor[0, :, 3:] = 7.0  # segment 2 and the padding of the first row
    first, second = (
        fast_layers.matrix_attention(nn.Identity(), *tensors, mask, scaling=0.3)[0] for tensors in (before, after)
    )
    assert torch.equal(first[0, :3], second[0, :3])
    assert not torch.equal(first[0, 3:], second[0, 3:])
    assert torch.equal(first[1:], second[1:])


def test_long_rows_take_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = document_mask(SEGMENTS, torch.float32)
    short = fast_layers.matrix_attention(nn.Identity(), *states(torch.float32), mask, scaling=0.3)[0]
    monkeypatch.setattr(fast_layers, "LONGEST_ROW", 7)
    module = nn.Identity()
    module.num_key_value_groups = 2
    called, original = [], fast_layers.sdpa_attention_forward
    monkeypatch.setattr(
        fast_layers,
        "sdpa_attention_forward",
        lambda *args, **kwargs: called.append(1) or original(*args, **kwargs),
    )
    long = fast_layers.matrix_attention(module, *states(torch.float32), mask, scaling=0.3)[0]
    assert called
    torch.testing.assert_close(long, short, rtol=0, atol=1e-6)


def test_weights_are_dropped_in_training_only() -> None:
    module, mask = nn.Identity(), document_mask(SEGMENTS, torch.float32)
    kept = fast_layers.matrix_attention(module, *states(torch.float32), mask, scaling=0.3)[0]
    torch.manual_seed(0)
    dropped = fast_layers.matrix_attention(module, *states(torch.float32), mask, scaling=0.3, dropout=0.5)[0]
    assert not torch.allclose(kept, dropped)
    still = fast_layers.matrix_attention(module.eval(), *states(torch.float32), mask, scaling=0.3, dropout=0.5)[0]
    assert torch.equal(kept, still)


@pytest.mark.parametrize(
    ("architecture", "precision", "device", "chosen"),
    [
        ("llama", "bfloat16", "cpu", True),
        ("qwen3", "bfloat16", "cpu", True),
        ("qwen2", "bfloat16", "cpu", False),  # biases: large scores, which bfloat16 would round
        ("llama", "float32", "cpu", False),
        ("qwen3", "bfloat16", "cuda", False),
    ],
)
def test_a_stock_model_takes_it_where_it_is_faster(
    architecture: str, precision: str, device: str, chosen: bool
) -> None:
    sizes = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    model = build_language_model(path=None, architecture=architecture, sizes=sizes, vocab_size=64, seed=0)
    embeds, mask = torch.randn(3, 8, sizes["hidden_size"]), document_mask(SEGMENTS, torch.float32)
    own = model.get_decoder().config._attn_implementation
    before = model.get_decoder()(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    fast_layers.use_matrix_attention(model, precision, torch.device(device))
    assert model.get_decoder().config._attn_implementation == (fast_layers.NAME if chosen else own)
    after = model.get_decoder()(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert fast_layers.NAME not in model.config.to_json_string()
