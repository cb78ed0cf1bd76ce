"""Causal attention within short samples by matrix products, in bfloat16 on a CPU: one operator and its gradient.

There torch's fused attention is slow to differentiate: 16 rows of 96 tokens with 16 heads of width 32 take 36.8 ms
forward and backward, 5.6 by products. And torch.compile keeps a layer in one piece around an operator
(docs/RESULTS.md). Called by `minivlm.model.fast_layers`.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from minivlm.model.segments import PackedLayout, take_rows, unpack_layout


def causal_products(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, *, scaling: float) -> Tensor:
    """softmax(query key^T * scaling, causal) value in bfloat16 throughout, as transformers' eager attention rounds it.

    Args:
        query: [1, H, M, D] bfloat16.
        key, value: [1, G, M, D]; head h reads group h // (H / G).

    Returns:
        [1, M, H, D], zeros where a token is of no sample of the layout.
    """
    mixed: Tensor = _attend(query, key, value, *layout, scaling)[0]
    return mixed


@torch.library.custom_op("minivlm::causal_products", mutates_args=(), device_types="cpu")
def _attend(
    query: Tensor, key: Tensor, value: Tensor, packed: Tensor, num_cells: int, num_scores: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Also what the gradient needs: states of all cells [(H + 2 G) * num_cells, D], weights [H * num_scores]."""
    groups, query_rows, key_rows = unpack_layout(packed)
    _, heads, num_tokens, width = query.shape
    key_heads = key.shape[1]
    cells, weights = _empty(query, key, num_cells, num_scores)
    parts = cells.split([heads * num_cells, key_heads * num_cells, key_heads * num_cells])
    for states, rows, part in zip((query, key, value), (query_rows, key_rows, key_rows), parts, strict=True):
        torch.index_select(states.transpose(1, 2).reshape(-1, width), 0, rows.cells, out=part)
    mixed = torch.empty_like(parts[0])
    for q, k, v, scores, result in zip(
        *(_by_group(rows, groups, key_heads) for rows in parts),
        _scores_by_group(weights, groups, heads, key_heads),
        _by_group(mixed, groups, key_heads),
        strict=True,
    ):
        mask = _causal_mask(scores.shape[2], heads // key_heads, query.dtype)
        torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scaling, out=scores)
        torch.softmax(scores, -1, out=scores)
        torch.bmm(scores, v, out=result)
    joined = take_rows(mixed, query_rows.tokens, query_rows.empty_tokens)
    return joined.view(1, num_tokens, heads, width), cells, weights


@torch.library.custom_op("minivlm::causal_products_backward", mutates_args=(), device_types="cpu")
def _differentiate(
    gradient: Tensor, cells: Tensor, weights: Tensor, packed: Tensor, num_cells: int, key_heads: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries [1, M, H, D], keys and values [1, M, G, D]."""
    groups, query_rows, key_rows = unpack_layout(packed)
    _, num_tokens, heads, width = gradient.shape
    sizes = [heads * num_cells, key_heads * num_cells, key_heads * num_cells]
    outer = take_rows(gradient.reshape(-1, width), query_rows.cells, query_rows.empty_cells)
    found = torch.empty_like(cells).split(sizes)
    for q, k, v, scores, d_out, d_q, d_k, d_v in zip(
        *(_by_group(rows, groups, key_heads) for rows in cells.split(sizes)),
        _scores_by_group(weights, groups, heads, key_heads),
        _by_group(outer, groups, key_heads),
        *(_by_group(rows, groups, key_heads) for rows in found),
        strict=True,
    ):
        torch.bmm(scores.transpose(1, 2), d_out, out=d_v)
        d_scores = torch._softmax_backward_data(torch.bmm(d_out, v.transpose(1, 2)), scores, -1, scores.dtype)
        torch.baddbmm(d_q, d_scores, k, beta=0, alpha=scaling, out=d_q)
        torch.baddbmm(d_k, d_scores.transpose(1, 2), q, beta=0, alpha=scaling, out=d_k)
    d_query, d_key, d_value = (
        take_rows(rows, kind.tokens, kind.empty_tokens).view(1, num_tokens, -1, width)
        for rows, kind in zip(found, (query_rows, key_rows, key_rows), strict=True)
    )
    return d_query, d_key, d_value


def _empty(query: Tensor, key: Tensor, num_cells: int, num_scores: int) -> tuple[Tensor, Tensor]:
    heads, key_heads, width = query.shape[1], key.shape[1], query.shape[3]
    return query.new_empty((heads + 2 * key_heads) * num_cells, width), query.new_empty(heads * num_scores)


def _by_group(rows: Tensor, groups: list[tuple[int, int]], key_heads: int) -> list[Tensor]:
    """Of each group [samples * key heads, tokens of its query or key heads, D]."""
    heads = rows.shape[0] // sum(count * width for count, width in groups)
    parts = rows.split([count * width * heads for count, width in groups])
    return [part.view(count * key_heads, -1, rows.shape[1]) for part, (count, _) in zip(parts, groups, strict=True)]


def _scores_by_group(weights: Tensor, groups: list[tuple[int, int]], heads: int, key_heads: int) -> list[Tensor]:
    parts = weights.split([count * width**2 * heads for count, width in groups])
    return [part.view(count * key_heads, -1, width) for part, (count, width) in zip(parts, groups, strict=True)]


@lru_cache(maxsize=64)
def _causal_mask(length: int, repeats: int, dtype: torch.dtype) -> Tensor:
    """[repeats * length, length] additive."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu_(1).repeat(repeats, 1)


@_attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, packed: Tensor, num_cells: int, num_scores: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    _, heads, num_tokens, width = query.shape
    return query.new_empty(1, num_tokens, heads, width), *_empty(query, key, num_cells, num_scores)


@_differentiate.register_fake
def _(
    gradient: Tensor, cells: Tensor, weights: Tensor, packed: Tensor, num_cells: int, key_heads: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    _, num_tokens, heads, width = gradient.shape
    each = [gradient.new_empty(1, num_tokens, count, width) for count in (heads, key_heads, key_heads)]
    return each[0], each[1], each[2]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, key, _, packed, ctx.num_cells, _, ctx.scaling = inputs
    ctx.key_heads = key.shape[1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], packed)


def _gradients(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    found = _differentiate(gradient, *ctx.saved_tensors, ctx.num_cells, ctx.key_heads, ctx.scaling)
    return *(states.transpose(1, 2) for states in found), None, None, None, None


_attend.register_autograd(_gradients, setup_context=_keep)
