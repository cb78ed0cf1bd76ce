"""Attention by the compiled kernel gives what torch's gives, whatever lies beside a sample and however many threads."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from minivlm.model import fast_layers, sample_attention
from minivlm.model.language import build_language_model
from minivlm.model.projector import build_projector
from minivlm.model.sample_attention import WIDTH_MULTIPLE, causal_attention, is_supported
from minivlm.model.segments import SampleSpans, segment_layouts
from minivlm.model.vlm import MiniVLM, cast_weights, document_mask
from tests.sample_lines import line_of
from tests.tiny_export import SIZES

pytestmark = pytest.mark.skipif(
    not is_supported(WIDTH_MULTIPLE), reason="the kernel is for CPUs with AVX-512 and bfloat16"
)

LENGTHS = (5, 40, 1, 33, 32, 64, 98)
SCALING = 0.2


def spans_of(segment_ids: Tensor) -> SampleSpans:
    """Of all samples."""
    spans, others = segment_layouts(segment_ids, (1, 1), 2**20, takes_spans=True)
    assert isinstance(spans, SampleSpans)
    assert others is None
    return spans


def test_spans_are_starts_and_lengths_of_the_short_samples():
    spans, others = segment_layouts(line_of((33, 70, 5), 0), (1, 1), 64, takes_spans=True)
    assert isinstance(spans, SampleSpans)
    assert spans.spans.tolist() == [0, 103, 33, 5]
    assert spans.num_weights == 64**2 + 32**2
    assert others is not None
    assert others.groups == [(1, 96)]


def test_tokens_of_no_sample_are_zeros_in_outputs_and_gradients():
    inputs = states(140)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    spans = SampleSpans(torch.tensor([10, 90, 40, 33]), 64**2 * 2)
    mixed = causal_attention(*leaves, spans, scaling=SCALING)
    found = [mixed, *(one.transpose(1, 2) for one in torch.autograd.grad(mixed.sum(), leaves))]
    is_empty = torch.ones(140, dtype=torch.bool)
    is_empty[10:50] = is_empty[90:123] = False
    for one in found:
        assert one[:, is_empty].count_nonzero() == 0
    assert bool(mixed[0, ~is_empty].flatten(1).count_nonzero(dim=1).all())


def states(num_tokens: int, heads: tuple[int, int] = (4, 2), width: int = 64, seed: int = 0) -> list[Tensor]:
    """Queries, keys and values, laid out as a projection leaves them."""
    generator = torch.Generator().manual_seed(seed)
    counts = (heads[0], heads[1], heads[1])
    drawn = [torch.randn(1, num_tokens, count, width, generator=generator) for count in counts]
    return [tensor.bfloat16().transpose(1, 2) for tensor in drawn]


def results(segment_ids: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Output [1, M, H, D] and the three gradients of a weighted sum of it, [1, M, heads, D]."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    mixed = causal_attention(*leaves, spans_of(segment_ids), scaling=SCALING)
    weight = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return [mixed.detach(), *(one.transpose(1, 2) for one in torch.autograd.grad(mixed, leaves, weight))]


def expected(segment_ids: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The same by torch's function in float64 under a mask."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    query, key, value = leaves
    repeats = query.shape[1] // key.shape[1]
    mixed = nn.functional.scaled_dot_product_attention(
        query,
        *(tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value)),
        attn_mask=document_mask(segment_ids, torch.float64),
        scale=SCALING,
    ).transpose(1, 2)
    mixed = mixed * (segment_ids != 0).view(1, -1, 1, 1)
    weight = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1)).bfloat16().double()
    return [mixed.detach(), *(one.transpose(1, 2) for one in torch.autograd.grad(mixed, leaves, weight))]


def assert_near(found: list[Tensor], wanted: list[Tensor]) -> None:
    """To bfloat16's 8 bits of the largest number."""
    for one, exact in zip(found, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), exact, rtol=0, atol=2**-7 * max(1.0, float(exact.abs().max())))


@pytest.mark.parametrize(("heads", "width"), [((4, 4), 64), ((4, 2), 64), ((6, 2), 32), ((4, 1), 128), ((1, 1), 96)])
def test_values_and_gradients_are_those_of_attention(heads: tuple[int, int], width: int):
    segment_ids = line_of(LENGTHS)
    inputs = states(segment_ids.numel(), heads, width)
    assert_near(results(segment_ids, inputs), expected(segment_ids, inputs))


@given(
    lengths=st.lists(st.integers(1, 140), min_size=1, max_size=5), padding=st.integers(0, 40), seed=st.integers(0, 9)
)
@settings(max_examples=40, deadline=None)
def test_of_any_lengths(lengths: list[int], padding: int, seed: int):
    segment_ids = line_of(tuple(lengths), padding)
    inputs = states(segment_ids.numel(), seed=seed)
    assert_near(results(segment_ids, inputs), expected(segment_ids, inputs))


def test_of_the_longest_that_it_is_used_for():
    segment_ids = line_of((512, 481))
    inputs = states(segment_ids.numel())
    assert_near(results(segment_ids, inputs), expected(segment_ids, inputs))


@given(lengths=st.lists(st.integers(1, 100), min_size=2, max_size=5), data=st.data())
@settings(max_examples=20, deadline=None)
def test_a_sample_alone_gives_the_same_bits(lengths: list[int], data: st.DataObject):
    segment_ids = line_of(tuple(lengths))
    inputs = states(segment_ids.numel())
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    mixed = causal_attention(*leaves, spans_of(segment_ids), scaling=SCALING)
    weight = torch.randn(mixed.shape).bfloat16()
    together = [mixed, *(one.transpose(1, 2) for one in torch.autograd.grad(mixed, leaves, weight))]
    chosen = segment_ids[0] == data.draw(st.integers(1, len(lengths)))
    leaves = [tensor[:, :, chosen].detach().requires_grad_() for tensor in inputs]
    mixed = causal_attention(*leaves, spans_of(line_of((int(chosen.sum()),), 0)), scaling=SCALING)
    alone = [mixed, *(one.transpose(1, 2) for one in torch.autograd.grad(mixed, leaves, weight[:, chosen]))]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one[:, chosen], other)


@pytest.mark.parametrize("changed", [0, 1, 2], ids=["queries", "keys", "values"])
def test_what_is_no_number_is_seen_within_its_sample_and_nowhere_else(changed: int):
    segment_ids = line_of(LENGTHS)
    before = states(segment_ids.numel())
    after = [tensor.clone() for tensor in before]
    is_broken = segment_ids[0] == 2
    after[changed][:, :, is_broken] = float("nan")
    for tensor in after:
        tensor[:, :, segment_ids[0] == 0] = float("nan")
    sound, broken = results(segment_ids, before), results(segment_ids, after)
    assert broken[0][:, is_broken].isnan().all()
    for first, second in zip(sound, broken, strict=True):
        assert torch.equal(first[:, ~is_broken], second[:, ~is_broken])


def test_large_scores_choose_one_key():
    segment_ids = line_of((70,), 0)
    inputs = states(70)
    inputs[0] *= 3000
    found = results(segment_ids, inputs)
    assert all(bool(one.isfinite().all()) for one in found)
    assert_near(found[:1], expected(segment_ids, inputs)[:1])


def test_any_order_of_memory_and_any_threads_give_the_same_bits():
    segment_ids = line_of(LENGTHS)
    inputs = states(segment_ids.numel())
    before = torch.get_num_threads()
    found = results(segment_ids, inputs)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            by_head = [tensor.contiguous() for tensor in inputs]
            by_width = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in inputs]
            for other in (by_head, by_width):
                assert all(map(torch.equal, found, results(segment_ids, other)))
    finally:
        torch.set_num_threads(before)


def test_other_numbers_and_scalings_are_refused():
    segment_ids = line_of((5,), 0)
    with pytest.raises(TypeError, match="float32"):
        causal_attention(*(tensor.float() for tensor in states(5)), spans_of(segment_ids), scaling=SCALING)
    with pytest.raises(ValueError, match="above 0"):
        causal_attention(*states(5), spans_of(segment_ids), scaling=0.0)


LIMITED = """
import torch
from minivlm.model.sample_attention import causal_attention
from minivlm.model.segments import SampleSpans

states = [torch.randn(1, heads, 5, 32).bfloat16() for heads in (4, 2, 2)]
causal_attention(*states, SampleSpans(torch.tensor([0, 5]), 32**2), scaling=0.2)
"""


def test_what_goes_wrong_in_the_kernel_is_an_error_of_python():
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    run = subprocess.run([sys.executable, "-c", LIMITED], env=environment, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert "Without its kernel: train.compile=false" in run.stderr


def test_the_operators_keep_the_rules_of_torch():
    segment_ids = line_of((5, 32, 1))  # of longer ones weights that nobody reads are left as they are
    inputs, spans = states(segment_ids.numel()), spans_of(segment_ids)
    operators = torch.ops.minivlm
    torch.library.opcheck(operators.sample_attention.default, (*inputs, *spans, SCALING))
    mixed, weights = operators.sample_attention(*inputs, *spans, SCALING)
    given_back = (torch.randn_like(mixed), *inputs, weights, spans.spans, SCALING)
    torch.library.opcheck(operators.sample_attention_backward.default, given_back)


@pytest.fixture
def vlm() -> MiniVLM:
    """Two layers with heads that fit the kernel, in bfloat16."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    sizes = SIZES | heads | {"num_hidden_layers": 2, "initializer_range": 0.2}
    language_model = build_language_model(path=None, architecture="llama", sizes=sizes, vocab_size=64, seed=0)
    vlm = MiniVLM(build_projector("linear", 8, sizes["hidden_size"]), language_model, image_token_id=3)
    cast_weights(vlm, torch.bfloat16)
    fast_layers.use_segment_attention(vlm)
    return vlm


def batch_of(*lengths: int) -> dict[str, Tensor]:
    """Text alone, every token learned."""
    tokens = torch.randint(4, 60, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": tokens,
        "labels": tokens,
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        "segment_ids": line_of(lengths, 0),
        "image_features": torch.zeros(0, 4, 8),
        "image_index": torch.zeros(0, dtype=torch.int64),
    }


def test_a_compiled_model_takes_it_and_computes_the_same(vlm: MiniVLM, monkeypatch: pytest.MonkeyPatch):
    batch = batch_of(50, 40, 9)
    calls, original = [], sample_attention.compile_kernel
    monkeypatch.setattr(sample_attention, "compile_kernel", lambda: calls.append(1) or original())
    names, weights = zip(*vlm.named_parameters(), strict=True)
    logps = vlm(batch).logps
    wanted = torch.autograd.grad(logps.sum(), weights, materialize_grads=True)
    assert calls == []
    fast_layers.compile_model(vlm, torch.device("cpu"))
    found = vlm(batch).logps
    gradients = torch.autograd.grad(found.sum(), weights, materialize_grads=True)
    assert len(calls) == 4  # two layers, forward and backward
    torch.testing.assert_close(found, logps, rtol=0, atol=0.1 * float(logps.detach().abs().max()))
    for name, gradient, exact in zip(names, gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=0, atol=0.1 * float(exact.abs().max()), msg=name)
    vlm(batch_of(60, 70)).logps.sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):  # for no number of samples
        for lengths in ((99,), (20,) * 9):
            vlm(batch_of(*lengths)).logps.sum().backward()


def test_models_without_such_attention_are_compiled_as_before():
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    vlm = MiniVLM(build_projector("linear", 8, 64), GPT2LMHeadModel(config), image_token_id=3)
    fast_layers.compile_model(vlm, torch.device("cpu"))
    fast_layers.use_segment_attention(vlm)
    assert not vlm.attends_by_segment
