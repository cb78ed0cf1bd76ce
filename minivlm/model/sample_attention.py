"""Causal attention within short samples by a kernel of our own, for CPUs with AVX-512 and bfloat16.

The kernel (`sample_attention.cpp`) keeps a head's scores in the cache between oneDNN's products, computes few that the
mask hides, and reads and writes states where they are: half the time of `minivlm.model.products` (docs/RESULTS.md),
which other machines take. Compiled with what torch.compile needs anyway. Called by `minivlm.model.fast_layers`.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minivlm.model.segments import SampleSpans

SOURCE = Path(__file__).with_suffix(".cpp")
WIDTH_MULTIPLE = 32
"""Of heads: numbers of bfloat16 in a register."""


@cache
def is_supported(width: int) -> bool:
    """Whether this machine's CPU runs the kernel for heads of so many dimensions."""
    has_units = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return has_units and torch.backends.cpu.get_cpu_capability() == "AVX512" and width % WIDTH_MULTIPLE == 0


@cache
def compile_kernel() -> ctypes.CDLL:
    """The compiled kernel, from torch.compile's cache on disk or, in some seconds, by its C++ compiler."""
    from torch._inductor.codecache import CppCodeCache  # seconds of imports

    kernel: ctypes.CDLL = CppCodeCache.load(SOURCE.read_text(), needs_vec_isa=True)
    kernel.attend.restype = kernel.differentiate.restype = ctypes.c_char_p
    return kernel


def causal_attention(query: Tensor, key: Tensor, value: Tensor, spans: SampleSpans, *, scaling: float) -> Tensor:
    """softmax(query key^T * scaling, causal) value within each sample; weights are rounded to bfloat16, scores are not.

    Args:
        query: [1, H, M, D] bfloat16.
        key, value: [1, G, M, D]; head h reads group h // (H / G).

    Returns:
        [1, M, H, D], zeros where a token is of no sample.
    """
    mixed: Tensor = _CausalAttention.apply(query, key, value, spans.spans, spans.num_weights, scaling)
    return mixed


class _CausalAttention(torch.autograd.Function):
    """Around the two operators."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: Tensor, num_weights: int, scaling: float
    ) -> Tensor:
        mixed, weights = torch.ops.minivlm.sample_attention(query, key, value, spans, num_weights, scaling)
        ctx.save_for_backward(query, key, value, weights, spans)
        ctx.scaling = scaling
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.minivlm.sample_attention_backward(gradient, *ctx.saved_tensors, ctx.scaling)
        return *(states.transpose(1, 2) for states in found), None, None, None


class _States(ctypes.Structure):
    """[M, heads, D] in memory."""

    _fields_ = (("data", ctypes.c_void_p), ("token_stride", ctypes.c_int64), ("head_stride", ctypes.c_int64))

    @classmethod
    def of(cls, states: Tensor) -> Any:
        """Of [1, M, heads, D]."""
        return ctypes.byref(cls(states.data_ptr(), states.stride(1), states.stride(2)))


class _Samples(ctypes.Structure):
    _fields_ = (
        ("starts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "num_tokens", "heads", "key_heads", "width")),
        ("scaling", ctypes.c_float),
    )

    @classmethod
    def of(cls, spans: Tensor, query: Tensor, key: Tensor, scaling: float) -> Any:
        if scaling <= 0:
            raise ValueError(f"attention with a scaling of {scaling}: it must be above 0")
        starts, lengths = spans.chunk(2)
        _, heads, num_tokens, width = query.shape
        sizes = (len(starts), num_tokens, heads, key.shape[1], width)
        return ctypes.byref(cls(starts.data_ptr(), lengths.data_ptr(), *sizes, scaling))


def _by_token(states: Tensor) -> Tensor:
    """[1, heads, M, D] -> [1, M, heads, D] whose rows are read as they lie."""
    return _in_rows(states.transpose(1, 2))


def _in_rows(states: Tensor) -> Tensor:
    if states.dtype != torch.bfloat16:
        raise TypeError(f"attention of {states.dtype} by a kernel for bfloat16")
    return states if states.stride(3) == 1 else states.contiguous()


def _check(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(
            f"attention within samples failed: {error.decode()}. Without its kernel: train.compile=false"
        )


def _attend(
    query: Tensor, key: Tensor, value: Tensor, spans: Tensor, num_weights: int, scaling: float
) -> tuple[Tensor, Tensor]:
    mixed, weights = _shapes_of_attend(query, key, value, spans, num_weights, scaling)
    given = [_by_token(states) for states in (query, key, value)]
    samples = _Samples.of(spans, query, key, scaling)
    weights_at = ctypes.c_void_p(weights.data_ptr())
    _check(compile_kernel().attend(samples, *map(_States.of, given), weights_at, _States.of(mixed)))
    return mixed, weights


def _differentiate(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, spans: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    found = _shapes_of_differentiate(gradient, query, key, value, weights, spans, scaling)
    given, outer = [_by_token(states) for states in (query, key, value)], _in_rows(gradient)
    samples = _Samples.of(spans, query, key, scaling)
    weights_at = ctypes.c_void_p(weights.data_ptr())
    states = map(_States.of, (outer, *found))
    _check(compile_kernel().differentiate(samples, *map(_States.of, given), weights_at, *states))
    return found


def _shapes_of_attend(
    query: Tensor, key: Tensor, value: Tensor, spans: Tensor, num_weights: int, scaling: float
) -> tuple[Tensor, Tensor]:
    _, heads, num_tokens, width = query.shape
    return query.new_empty(1, num_tokens, heads, width), query.new_empty(heads * num_weights)


def _shapes_of_differentiate(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, spans: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    _, heads, num_tokens, width = query.shape
    each = [query.new_empty(1, num_tokens, count, width) for count in (heads, key.shape[1], key.shape[1])]
    return each[0], each[1], each[2]


_library = torch.library.Library("minivlm", "FRAGMENT")  # custom_op would check each call for aliases
_library.define(
    "sample_attention(Tensor query, Tensor key, Tensor value, Tensor spans, SymInt num_weights, float scaling) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "sample_attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor weights, Tensor spans, "
    "float scaling) -> (Tensor, Tensor, Tensor)"
)
_library.impl("sample_attention", _attend, "CPU")
_library.impl("sample_attention_backward", _differentiate, "CPU")
torch.library.register_fake("minivlm::sample_attention", _shapes_of_attend, lib=_library)
torch.library.register_fake("minivlm::sample_attention_backward", _shapes_of_differentiate, lib=_library)
