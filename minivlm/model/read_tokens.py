"""Which tokens the head reads, and rows of states for these only. Called by `minivlm.model.vlm` and its last layer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from minivlm.model.segments import line_length

IGNORE = -100


class ReadTokens(NamedTuple):
    """Which of M tokens the head reads, and the way back. R is a `line_length`, as oneDNN keeps a kernel of 10 MB and
    20 ms for every number of rows that it meets (vocabulary 6400; docs/RESULTS.md)."""

    tokens: Tensor
    """[R] int64, those read, in order, then 0."""

    is_token: Tensor
    """[R] bool, False where `tokens` means nothing."""

    rows: Tensor
    """[M] int64, where each token is in `tokens`."""

    is_read: Tensor
    """[M] bool, False where `rows` means nothing."""


def next_labels(labels: Tensor) -> Tensor:
    """What each token predicts, or -100: [B, T] labels of the tokens after them.

    Args:
        labels: [B, T], -100 = ignore, as the first of every sample is.
    """
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORE)


def read_tokens(targets: Tensor) -> ReadTokens:
    """Tokens that predict something, counted through all rows.

    Args:
        targets: [B, T], of `next_labels`.
    """
    is_read = (targets != IGNORE).flatten()
    tokens = is_read.nonzero().squeeze(1)
    padded = functional.pad(tokens, (0, line_length(len(tokens)) - len(tokens)))
    is_token = torch.arange(len(padded), device=targets.device) < len(tokens)
    return ReadTokens(padded, is_token, (is_read.cumsum(0) - 1).clamp(min=0), is_read)


def take(states: Tensor, read: ReadTokens) -> Tensor:
    """States of the read tokens: [..., M, D] -> [..., R, D], zeros where there is no token."""
    result: Tensor = _Move.apply(states, *read)
    return result


def spread(states: Tensor, read: ReadTokens) -> Tensor:
    """The way back: [..., R, D] -> [..., M, D], zeros for tokens that are not read."""
    result: Tensor = _Move.apply(states, read.rows, read.is_read, read.tokens, read.is_token)
    return result


class _Move(torch.autograd.Function):
    """Rows to other places; none goes to two, so the gradient is the way back, and nothing is added up."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, index: Tensor, is_there: Tensor, back: Tensor, is_back: Tensor) -> Tensor:
        ctx.save_for_backward(back, is_back)
        return _pick(states, index, is_there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _pick(gradient, *ctx.saved_tensors), None, None, None, None


def _pick(states: Tensor, index: Tensor, is_there: Tensor) -> Tensor:
    return torch.where(is_there.unsqueeze(-1), states.index_select(-2, index), 0.0)
