"""Micro-batches without rows: all tokens in one line, and where attention finds each sample in it.

Attention runs on groups of samples of similar length, causally within each sample, so that no mask says who may look at
whom and no product is computed between samples. Everything else in a decoder is token by token and computes no padding
but that to a multiple of `TOKEN_MULTIPLE`. Called by `minivlm.model.vlm`, used by `minivlm.model.fast_layers`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

TOKEN_MULTIPLE = 64
"""Tokens of a micro-batch: for bfloat16 oneDNN compiles a kernel for each number of rows that it meets and keeps it."""

WIDTH_MULTIPLE = 32
"""Tokens of the samples of one group, with padding: torch's softmax works on 32 bfloat16 at a time and is up to 2.5
times slower with a rest (2.2 ms for 16 samples of 92 tokens, 0.9 for 96)."""

Rows = tuple[Tensor, Tensor]
"""Which row to take for each row of the result, and which rows of the result are zero instead."""


class SegmentLayout:
    """Where the samples of M tokens stand, and the cells that attention computes on: groups of [samples, width]."""

    def __init__(self, segment_ids: Tensor) -> None:
        """
        Args:
            segment_ids: [1, M] int64, the tokens of a sample side by side, another id for each; 0 = padding.
        """
        self.num_tokens = segment_ids.numel()
        self.device = segment_ids.device
        ids, lengths = torch.unique_consecutive(segment_ids.flatten().cpu(), return_counts=True)
        starts = lengths.cumsum(0) - lengths
        is_sample = ids != 0
        if not bool(is_sample.any()):
            is_sample[0] = True  # attention must run, as on all other ranks: the padding is a sample
        starts, lengths = starts[is_sample], lengths[is_sample]
        widths = group_width(lengths)
        self.groups: list[tuple[int, int]] = []
        """Samples and width of each group."""
        self._cells: list[Tensor] = []
        for width in widths.unique().tolist():
            places = torch.arange(width)
            in_group = widths == width
            cells = starts[in_group].unsqueeze(1) + places
            self._cells.append(cells.masked_fill(places >= lengths[in_group].unsqueeze(1), -1))
            self.groups.append((int(in_group.sum()), width))
        self._rows: dict[int, tuple[Rows, Rows]] = {}

    def split(self, states: Tensor) -> list[Tensor]:
        """Take [1, H, M, D] apart: for each group [samples, H, width, D], zeros where a sample is shorter."""
        heads, width = states.shape[1], states.shape[3]
        to_cells, to_tokens = self._rows_of(heads)
        rows = states.transpose(1, 2).reshape(-1, width)
        cells = _Rearrange.apply(rows, to_cells, to_tokens)
        parts = cells.split([count * heads * length for count, length in self.groups])
        return [
            part.view(count, heads, length, width) for part, (count, length) in zip(parts, self.groups, strict=True)
        ]

    def join(self, parts: list[Tensor]) -> Tensor:
        """Inverse of `split`: [1, M, H, D], zeros where a token is padding."""
        heads, width = parts[0].shape[1], parts[0].shape[3]
        to_cells, to_tokens = self._rows_of(heads)
        cells = torch.cat([part.reshape(-1, width) for part in parts])
        rows = _Rearrange.apply(cells, to_tokens, to_cells)
        return rows.view(1, self.num_tokens, heads, width)

    def _rows_of(self, heads: int) -> tuple[Rows, Rows]:
        """Of a matrix of one row per token and head to one row per cell, and back."""
        if heads not in self._rows:
            each = torch.arange(heads).view(1, heads, 1)
            to_cells = torch.cat([(cells.unsqueeze(1) * heads + each).flatten() for cells in self._cells])
            to_tokens = torch.full((self.num_tokens * heads,), -1)
            is_filled = to_cells >= 0
            to_tokens[to_cells[is_filled]] = is_filled.nonzero().squeeze(1)
            self._rows[heads] = self._rows_with_zeros(to_cells), self._rows_with_zeros(to_tokens)
        return self._rows[heads]

    def _rows_with_zeros(self, index: Tensor) -> Rows:
        return index.clamp(min=0).to(self.device), (index < 0).nonzero().squeeze(1).to(self.device)


class _Rearrange(torch.autograd.Function):
    """Rows in another order; no row is taken twice, so the gradient is the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Rows, back: Rows) -> Tensor:
        ctx.back = back
        return _take(rows, there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _take(gradient, ctx.back), None, None


def _take(rows: Tensor, index: Rows) -> Tensor:
    return rows.index_select(0, index[0]).index_fill_(0, index[1], 0.0)


def group_width(lengths: Tensor) -> Tensor:
    """Width of the group of each sample of so many tokens."""
    return -(-lengths // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def line_length(num_tokens: int) -> int:
    """Tokens computed for a micro-batch of so many, padding included; at least one multiple."""
    return max(1, -(-num_tokens // TOKEN_MULTIPLE)) * TOKEN_MULTIPLE


def flatten_rows(batch: dict[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """The same micro-batch in one line of a multiple of `TOKEN_MULTIPLE` tokens, its other columns as they are.

    Args:
        batch: input_ids, labels, position_ids, segment_ids [B, T].

    Returns:
        These as [1, M], in reading order, padding at the end.
    """
    tokens = batch["segment_ids"].flatten().nonzero().squeeze(1)
    missing = line_length(len(tokens)) - len(tokens)
    padding = {"input_ids": pad_token_id, "labels": -100, "position_ids": 0, "segment_ids": 0}
    lines = {
        name: functional.pad(batch[name].flatten()[tokens], (0, missing), value=value).unsqueeze(0)
        for name, value in padding.items()
    }
    return {**batch, **lines}
