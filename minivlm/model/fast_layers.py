"""Faster layers of a stock language model in training: attention by matrix products, and torch.compile.

In bfloat16 on a CPU torch's fused attention is slow to differentiate: forward and backward of 16 rows of 96 tokens with
16 heads of width 32 took 36.8 ms, and 5.6 ms by matrix products (2 threads, AMX; docs/RESULTS.md). Called by
`minivlm.train.initial` and, to compare exports, `minivlm.train.reload`.
"""

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from minivlm.model.lora import decoder_layers

NAME = "minivlm_matrix"
ARCHITECTURES = ("llama", "qwen3", "qwen3_moe")
LONGEST_ROW = 512
"""Tokens. Weights in memory grow with the square: longer rows take the fused kernel."""


def use_matrix_attention(language_model: PreTrainedModel, precision: str, device: torch.device) -> None:
    """Choose this attention where it is faster and known to be the same; elsewhere the model keeps its own.

    Only for `ARCHITECTURES` without biases of queries and keys: others pass arguments of their own, or have large
    scores, which bfloat16 rounds here (as in transformers' eager attention) but not in the fused kernel. No export
    remembers the choice.
    """
    config = language_model.config
    is_known = config.model_type in ARCHITECTURES and not getattr(config, "attention_bias", False)
    if precision == "bfloat16" and device.type == "cpu" and is_known:
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
        attention_mask: additive, [B, 1, T, T]; without one the fused kernel runs.

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
    """torch.compile each decoder layer in place. All layers share what is compiled: for rows of any length, and again
    for some special shapes (one row, as many rows as tokens).

    Raises:
        ValueError: no C++ compiler or no headers of Python, which a CPU needs.
    """
    if device.type == "cpu":
        compiler, header = os.environ.get("CXX", "g++"), Path(sysconfig.get_path("include")) / "Python.h"
        if shutil.which(compiler) is None or not header.is_file():
            raise ValueError("torch.compile needs g++ and python3-dev: install them, or type train.compile=false")
    torch._dynamo.config.recompile_limit = 64  # at the usual 8 later shapes would run as they are, by order of arrival
    for layer in decoder_layers(language_model):
        layer.compile(dynamic=True)
