"""Micro-batches without rows: all tokens in one line, and where attention finds each sample in it.

Attention runs on groups of samples of similar length, causally within each sample, so that no mask says who may look at
whom and no product is computed between samples. Everything else in a decoder is token by token and computes no padding
but that to a multiple of 16 or 64. Called by `minivlm.model.vlm`, used by `minivlm.model.fast_layers`.
"""

import operator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

FEW_TOKENS = 1024
"""Tokens of a micro-batch are a multiple of 16 up to here, of 64 above: for bfloat16 oneDNN compiles a kernel for each
number of rows that it meets and keeps it, so there should be few (4096 tokens can have 112)."""

WIDTH_MULTIPLE = 32
"""Tokens of the samples of one group, with padding: torch's softmax works on 32 bfloat16 at a time and is up to 2.5
times slower with a rest (2.2 ms for 16 samples of 92 tokens, 0.9 for 96)."""


class HeadRows(NamedTuple):
    """Between a matrix of one row per token and head and one of a row per cell and head, int64 indices both ways."""

    cells: Tensor
    """Row of the token for each cell; where a sample is shorter than its group, that of the sample's last token."""

    empty_cells: Tensor
    """Which cells those are."""

    tokens: Tensor
    """Row of the cell for each token."""

    empty_tokens: Tensor
    """Which tokens have none; their entry in `tokens` means nothing."""


class SegmentLayout:
    """Where samples stand in a line of M tokens, and the cells attention computes on: groups of [samples, width]."""

    def __init__(self, starts: Tensor, lengths: Tensor, num_tokens: int, heads: tuple[int, int], device: torch.device):
        """
        Args:
            starts, lengths: [S] int64 on the CPU, of the samples.
            heads: of queries and of keys.
        """
        self.num_tokens = num_tokens
        widths = group_width(lengths)
        self.groups: list[tuple[int, int]] = []
        """Samples and width of each group."""
        cells, is_empty = [], []
        for width in widths.unique().tolist():
            places, in_group = torch.arange(width), widths == width
            last = lengths[in_group].unsqueeze(1) - 1
            cells.append((starts[in_group].unsqueeze(1) + places.minimum(last)).flatten())
            is_empty.append((places > last).flatten())
            self.groups.append((int(in_group.sum()), width))
        self.query, self.key = (self._rows(torch.cat(cells), torch.cat(is_empty), count, device) for count in heads)

    def _rows(self, cells: Tensor, is_empty: Tensor, heads: int, device: torch.device) -> HeadRows:
        """Groups one after the other, within one by sample, head and place: `view(samples, heads, width, D)`."""
        each = torch.arange(heads).view(1, heads, 1)
        sizes = [count * width for count, width in self.groups]
        by_head = [
            (
                (part.view(count, 1, width) * heads + each).flatten(),
                empty.view(count, 1, width).expand(-1, heads, -1).flatten(),
            )
            for part, empty, (count, width) in zip(cells.split(sizes), is_empty.split(sizes), self.groups, strict=True)
        ]
        rows, no_token = (torch.cat(parts) for parts in zip(*by_head, strict=True))
        tokens = torch.full((self.num_tokens * heads,), -1)
        tokens[rows[~no_token]] = (~no_token).nonzero().squeeze(1)
        no_cell = (tokens < 0).nonzero().squeeze(1)
        found = HeadRows(rows, no_token.nonzero().squeeze(1), tokens.clamp(min=0), no_cell)
        return HeadRows(*(tensor.to(device) for tensor in found))

    def split(self, states: Tensor, rows: HeadRows) -> list[Tensor]:
        """Take [1, H, M, D] apart: for each group [samples, H, width, D], zeros where a sample is shorter.

        Args:
            rows: `query` or `key`.
        """
        heads, width = states.shape[1], states.shape[3]
        there, back = (rows.cells, rows.empty_cells), (rows.tokens, rows.empty_tokens)
        cells = _Rearrange.apply(states.transpose(1, 2).reshape(-1, width), there, back)
        parts = cells.split([count * heads * length for count, length in self.groups])
        return [
            part.view(count, heads, length, width) for part, (count, length) in zip(parts, self.groups, strict=True)
        ]

    def join(self, parts: list[Tensor]) -> Tensor:
        """Inverse of `split` for queries: [1, M, H, D], zeros where a token is of no sample here."""
        heads, width = parts[0].shape[1], parts[0].shape[3]
        there, back = (self.query.tokens, self.query.empty_tokens), (self.query.cells, self.query.empty_cells)
        cells = torch.cat([part.reshape(-1, width) for part in parts])
        return _Rearrange.apply(cells, there, back).view(1, self.num_tokens, heads, width)


class PackedLayout(NamedTuple):
    """A layout in one tensor, which a compiled layer takes whatever the number of groups."""

    packed: Tensor
    """[K] int64; see `unpack_layout`."""

    num_cells: int
    """Per head."""

    num_scores: int
    """Per head of the queries."""


class SampleSpans(NamedTuple):
    """Where samples stand in a line of tokens, for an operator that reads them there."""

    spans: Tensor
    """[2 S] int64: starts, then lengths. One line, since torch.compile takes a size of 1 for another program."""

    num_weights: int
    """Per head of the queries: of every sample the square of its `group_width`."""


def pack_layout(layout: SegmentLayout) -> PackedLayout:
    """Copy all of a layout."""
    indices = (*layout.query, *layout.key)
    counts, widths = zip(*layout.groups, strict=True)
    header = torch.tensor([len(counts), *map(len, indices), *counts, *widths]).to(indices[0].device)
    num_scores = sum(count * width**2 for count, width in layout.groups)
    return PackedLayout(torch.cat([header, *indices]), sum(map(operator.mul, counts, widths)), num_scores)


@lru_cache(maxsize=8)  # by identity, as tensors have it: every layer of a step asks for the same
def unpack_layout(packed: Tensor) -> tuple[list[tuple[int, int]], HeadRows, HeadRows]:
    """Groups and rows of queries and keys of `PackedLayout.packed`."""
    num_groups, *sizes = packed[:9].tolist()
    counts, widths, *indices = packed[9:].split([num_groups, num_groups, *sizes])
    return list(zip(counts.tolist(), widths.tolist(), strict=True)), HeadRows(*indices[:4]), HeadRows(*indices[4:])


class _Rearrange(torch.autograd.Function):
    """Rows in another order; no row is taken twice, so the gradient is the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: tuple[Tensor, Tensor], back: tuple[Tensor, Tensor]) -> Tensor:
        ctx.back = back
        return take_rows(rows, *there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return take_rows(gradient, *ctx.back), None, None


def take_rows(rows: Tensor, index: Tensor, empty: Tensor) -> Tensor:
    """The rows of a matrix by index, zeros in those of the result that are empty."""
    return rows.index_select(0, index).index_fill_(0, empty, 0.0)


Layouts = tuple[PackedLayout | SampleSpans | None, SegmentLayout | None]
"""Of the samples of groups up to some width, and of the others; None where there are none."""


def segment_layouts(
    segment_ids: Tensor, heads: tuple[int, int], longest_product: int, *, takes_spans: bool = False
) -> Layouts:
    """How the samples of a line attend.

    Args:
        segment_ids: [1, M] int64, the tokens of a sample side by side, another id for each; 0 = padding.
        heads: of queries and of keys.
        longest_product: width of the widest group that the first layout is for.
        takes_spans: the first layout is SampleSpans.
    """
    ids, lengths = torch.unique_consecutive(segment_ids.flatten().cpu(), return_counts=True)
    starts = lengths.cumsum(0) - lengths
    is_sample = ids != 0
    if not bool(is_sample.any()):
        is_sample[0] = True  # attention must run, as on all other ranks: the padding is a sample
    is_short = group_width(lengths) <= longest_product

    def layout(chosen: Tensor) -> SegmentLayout:
        return SegmentLayout(starts[chosen], lengths[chosen], segment_ids.numel(), heads, segment_ids.device)

    short, long = is_sample & is_short, is_sample & ~is_short
    others = layout(long) if bool(long.any()) else None
    if not bool(short.any()):
        return None, others
    if takes_spans:
        spans = torch.cat([starts[short], lengths[short]])
        return SampleSpans(spans, int(group_width(lengths[short]).square().sum())), others
    return pack_layout(layout(short)), others


def group_width(lengths: Tensor) -> Tensor:
    """Width of the group of each sample of so many tokens."""
    return -(-lengths // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def line_length(num_tokens: int) -> int:
    """Tokens computed for a micro-batch of so many, padding included; at least one multiple."""
    multiple = 16 if num_tokens <= FEW_TOKENS else 64
    return max(1, -(-num_tokens // multiple)) * multiple


def flatten_rows(batch: dict[str, Tensor], pad_token_id: int, is_needed: Tensor) -> dict[str, Tensor]:
    """The same micro-batch in one line of `line_length` tokens, its other columns as they are.

    Args:
        batch: input_ids, targets, position_ids, segment_ids [B, T].
        is_needed: [B, T] bool. What follows the last such token of a sample, as its end token does, is left out:
            attention is causal, so nothing depends on it.

    Returns:
        These as [1, M], in reading order, padding at the end.
    """
    tokens = _without_tails(batch["segment_ids"].flatten(), is_needed.flatten())
    missing = line_length(len(tokens)) - len(tokens)
    padding = {"input_ids": pad_token_id, "targets": -100, "position_ids": 0, "segment_ids": 0}
    lines = {
        name: functional.pad(batch[name].flatten()[tokens], (0, missing), value=value).unsqueeze(0)
        for name, value in padding.items()
    }
    return {**batch, **lines}


def _without_tails(segment_ids: Tensor, is_needed: Tensor) -> Tensor:
    """Places that are needed, or before one of the same segment that is."""
    places = torch.arange(len(segment_ids), device=segment_ids.device)
    none = len(segment_ids)
    next_needed = torch.where(is_needed, places, none).flip(0).cummin(0).values.flip(0)
    its_segment = functional.pad(segment_ids, (0, 1))[next_needed]
    return ((segment_ids != 0) & (segment_ids == its_segment)).nonzero().squeeze(1)
