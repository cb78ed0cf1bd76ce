"""Faster layers of a stock language model in training: attention by matrix products, and torch.compile.

In bfloat16 on a CPU the backward of torch's fused attention is slow: forward and backward of 16 rows of 96 tokens with
16 heads of width 32 took 36.8 ms, and 5.6 ms by matrix products (2 threads, AMX; docs/RESULTS.md). Called by
`minivlm.train.initial`.
"""

import os
import shutil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from minivlm.model.lora import decoder_layers

NAME = "minivlm_matrix"
LONGEST_ROW = 512
"""Tokens. Weights in memory grow with the square: longer rows take the fused kernel."""


def use_matrix_attention(language_model: PreTrainedModel, precision: str, device: torch.device) -> None:
    """Choose this attention where it is faster; elsewhere the model keeps its own. No export remembers it."""
    if precision == "bfloat16" and device.type == "cpu":
        AttentionInterface.register(NAME, matrix_attention)
        language_model.set_attn_implementation(NAME)


def matrix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(query key^T * scaling + mask) value, by transformers' contract of an attention function.

    Args:
        query: [B, H, T, D].
        key, value: [B, G, T, D]; head h reads group h // (H / G).
        attention_mask: additive, [B, 1, T, T]; required.

    Returns:
        [B, T, H, D], and no weights.
    """
    batch, heads, length, width = query.shape
    if length > LONGEST_ROW or attention_mask is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
    grouped = (batch, key.shape[1], -1)
    scores = (query.reshape(*grouped, width) * scaling) @ key.transpose(-1, -2)
    weights = (scores.view(batch, heads, length, length) + attention_mask).softmax(dim=-1)
    weights = functional.dropout(weights, dropout, training=module.training)
    mixed = weights.view(*grouped, length) @ value
    return mixed.view(batch, heads, length, width).transpose(1, 2), None


def compile_layers(language_model: PreTrainedModel, device: torch.device) -> None:
    """torch.compile each decoder layer in place: all share what is compiled once, for rows of every length.

    Raises:
        ValueError: no C++ compiler, which a CPU needs.
    """
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ValueError("torch.compile needs a C++ compiler: install g++, or type train.compile=false")
    for layer in decoder_layers(language_model):
        layer.compile(dynamic=True)
