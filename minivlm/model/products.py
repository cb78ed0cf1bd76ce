"""Causal attention within short samples by matrix products, in bfloat16 on a CPU: one operator and its gradient.

There torch's fused attention is slow to differentiate: 16 rows of 96 tokens with 16 heads of width 32 take 36.8 ms
forward and backward, 5.6 by products. And torch.compile keeps a layer in one piece around an operator
(docs/RESULTS.md). Called by `minivlm.model.fast_layers`.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minivlm.model.segments import HeadRows, PackedLayout, take_rows, unpack_layout


def causal_products(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, *, scaling: float) -> Tensor:
    """softmax(query key^T * scaling, causal) value in bfloat16 throughout, as transformers' eager attention rounds it.

    Args:
        query: [1, H, M, D] bfloat16.
        key, value: [1, G, M, D]; head h reads group h // (H / G).

    Returns:
        [1, M, H, D], zeros where a token is of no sample of the layout.
    """
    mixed: Tensor = _CausalProducts.apply(query, key, value, *layout, scaling)
    return mixed


class _CausalProducts(torch.autograd.Function):
    """Around the two operators: registered as one's gradient, the other costs 0.1 ms more each time."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packed: Tensor,
        num_cells: int,
        num_scores: int,
        scaling: float,
    ) -> Tensor:
        mixed, cells, weights = torch.ops.minivlm.causal_products(
            query, key, value, packed, num_cells, num_scores, scaling
        )
        ctx.save_for_backward(cells, weights, packed)
        ctx.num_cells, ctx.key_heads, ctx.scaling = num_cells, key.shape[1], scaling
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.minivlm.causal_products_backward(
            gradient, *ctx.saved_tensors, ctx.num_cells, ctx.key_heads, ctx.scaling
        )
        return *(states.transpose(1, 2) for states in found), None, None, None, None


class _Groups(NamedTuple):
    """How matrices of a row per cell and head, one after the other by group, are views by group."""

    sizes: list[int]
    """Rows of each group; of scores their number."""

    shapes: list[tuple[int, int, int]]
    """[samples * key heads, tokens of its query or key heads, D, or for scores tokens]."""

    def of(self, rows: Tensor) -> list[Tensor]:
        """The views."""
        return [part.view(shape) for part, shape in zip(rows.split_with_sizes(self.sizes), self.shapes, strict=True)]


class _Layout(NamedTuple):
    """What all layers of a step ask of a layout, made once."""

    query_rows: HeadRows
    key_rows: HeadRows
    cells: list[int]
    """Rows of all queries, keys and values."""

    queries: _Groups
    keys: _Groups
    scores: _Groups


@lru_cache(maxsize=8)
def _layout(packed: Tensor, heads: int, key_heads: int, width: int) -> _Layout:
    groups, query_rows, key_rows = unpack_layout(packed)
    num_cells = sum(count * length for count, length in groups)
    repeats = heads // key_heads

    def by_group(tokens: int, columns: int | None) -> _Groups:
        shapes = [(count * key_heads, tokens * length, columns or length) for count, length in groups]
        rows = [count * key_heads * tokens * length for count, length in groups]
        sizes = [size * (1 if columns else length) for size, (_, length) in zip(rows, groups, strict=True)]
        return _Groups(sizes, shapes)

    cells = [heads * num_cells, key_heads * num_cells, key_heads * num_cells]
    return _Layout(query_rows, key_rows, cells, by_group(repeats, width), by_group(1, width), by_group(repeats, None))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, packed: Tensor, num_cells: int, num_scores: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Also what the gradient needs: states of all cells [(H + 2 G) * num_cells, D], weights [H * num_scores]."""
    _, heads, num_tokens, width = query.shape
    key_heads = key.shape[1]
    layout = _layout(packed, heads, key_heads, width)
    query_rows, key_rows = layout.query_rows, layout.key_rows
    cells, weights = _empty(query, key, num_cells, num_scores)
    parts = cells.split_with_sizes(layout.cells)
    for states, rows, part in zip((query, key, value), (query_rows, key_rows, key_rows), parts, strict=True):
        torch.index_select(states.transpose(1, 2).reshape(-1, width), 0, rows.cells, out=part)
    mixed = torch.empty_like(parts[0])
    for q, k, v, scores, result in zip(
        layout.queries.of(parts[0]),
        layout.keys.of(parts[1]),
        layout.keys.of(parts[2]),
        layout.scores.of(weights),
        layout.queries.of(mixed),
        strict=True,
    ):
        mask = _causal_mask(scores.shape[2], heads // key_heads, query.dtype)
        torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scaling, out=scores)
        torch.softmax(scores, -1, out=scores)
        torch.bmm(scores, v, out=result)
    joined = take_rows(mixed, query_rows.tokens, query_rows.empty_tokens)
    return joined.view(1, num_tokens, heads, width), cells, weights


def _differentiate(
    gradient: Tensor, cells: Tensor, weights: Tensor, packed: Tensor, num_cells: int, key_heads: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries [1, M, H, D], keys and values [1, M, G, D]."""
    _, num_tokens, heads, width = gradient.shape
    layout = _layout(packed, heads, key_heads, width)
    query_rows, key_rows = layout.query_rows, layout.key_rows
    outer = take_rows(gradient.reshape(-1, width), query_rows.cells, query_rows.empty_cells)
    given, found = cells.split_with_sizes(layout.cells), torch.empty_like(cells).split_with_sizes(layout.cells)
    kinds = (layout.queries, layout.keys, layout.keys)
    for scores, d_out, q, k, v, d_q, d_k, d_v in zip(
        layout.scores.of(weights),
        layout.queries.of(outer),
        *(kind.of(rows) for kind, rows in zip(kinds, given, strict=True)),
        *(kind.of(rows) for kind, rows in zip(kinds, found, strict=True)),
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


@lru_cache(maxsize=64)
def _causal_mask(length: int, repeats: int, dtype: torch.dtype) -> Tensor:
    """[repeats * length, length] additive."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu_(1).repeat(repeats, 1)


def _shapes_of_attend(
    query: Tensor, key: Tensor, value: Tensor, packed: Tensor, num_cells: int, num_scores: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    _, heads, num_tokens, width = query.shape
    return query.new_empty(1, num_tokens, heads, width), *_empty(query, key, num_cells, num_scores)


def _shapes_of_differentiate(
    gradient: Tensor, cells: Tensor, weights: Tensor, packed: Tensor, num_cells: int, key_heads: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    _, num_tokens, heads, width = gradient.shape
    each = [gradient.new_empty(1, num_tokens, count, width) for count in (heads, key_heads, key_heads)]
    return each[0], each[1], each[2]


_library = torch.library.Library("minivlm", "DEF")  # custom_op would check each call for aliases
_library.define(
    "causal_products(Tensor query, Tensor key, Tensor value, Tensor packed, SymInt num_cells, SymInt num_scores, "
    "float scaling) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "causal_products_backward(Tensor gradient, Tensor cells, Tensor weights, Tensor packed, SymInt num_cells, "
    "int key_heads, float scaling) -> (Tensor, Tensor, Tensor)"
)
_library.impl("causal_products", _attend, "CPU")
_library.impl("causal_products_backward", _differentiate, "CPU")
torch.library.register_fake("minivlm::causal_products", _shapes_of_attend, lib=_library)
torch.library.register_fake("minivlm::causal_products_backward", _shapes_of_differentiate, lib=_library)
