"""Faster layers of a stock language model in training: attention sample by sample, and torch.compile.

Samples of 64 to 98 tokens lie two in a row of 184: under a mask half of the scores are between samples. Called by
`minivlm.train.initial` and, to compare exports, `minivlm.train.reload`.
"""

import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from minivlm.log import get_logger
from minivlm.model.last_layer import forward_read
from minivlm.model.lora import decoder_layers
from minivlm.model.products import causal_products
from minivlm.model.sample_attention import causal_attention
from minivlm.model.segments import Layouts, SampleSpans, SegmentLayout
from minivlm.model.vlm import MiniVLM

log = get_logger(__name__)

NAME = "minivlm_segments"
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_moe")
LONGEST_PRODUCT = 512
"""Tokens of samples that take `causal_products`. Weights in memory grow with the square: longer ones take the stock
function; so do all where biases make scores large, which products round to bfloat16, or where weights are dropped."""


def use_segment_attention(vlm: MiniVLM) -> None:
    """Let a model that is known to need nothing else attend sample by sample (`minivlm.model.segments`).

    Others (of unknown architecture, or with a sliding window) keep rows and a mask. No export remembers the choice.
    """
    config = vlm.language_model.config
    if config.model_type in ARCHITECTURES and not getattr(config, "use_sliding_window", False):
        AttentionInterface.register(NAME, segment_attention)
        vlm.language_model.set_attn_implementation(NAME)
        vlm.attends_by_segment = True
        vlm.head_width = decoder_layers(vlm.language_model)[0].self_attn.head_dim
        rope = getattr(vlm.language_model.get_decoder().rotary_emb, "rope_type", "default")
        # the router's loss takes all tokens; frequencies of these depend on the largest position
        vlm.leaves_out_tails = config.model_type != "qwen3_moe" and rope not in ("dynamic", "longrope")
        has_bias = config.model_type == "qwen2" or getattr(config, "attention_bias", False)
        vlm.longest_product = 0 if has_bias or config.attention_dropout else LONGEST_PRODUCT
        if config.model_type != "qwen3_moe":  # whose loss takes all tokens' routes in every layer
            last = decoder_layers(vlm.language_model)[-1]
            last.__class__ = _reading(type(last))  # type: ignore[arg-type]  # mypy thinks it has no hash
            vlm.ends_with_read = True


@cache
def _reading(kind: type[nn.Module]) -> type[nn.Module]:
    """Layers of a kind that compute for the tokens read. A class, as transformers checkpoints what classes define."""
    return type(kind.__name__, (kind,), {"forward": forward_read})


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    layouts: Layouts | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample, by transformers' contract of an attention function.

    Args:
        query: [1, H, M, D], or [B, H, T, D] without layouts.
        key, value: as many tokens of G heads; head h reads group h // (H / G).
        attention_mask: without layouts, as for transformers' own function, which then runs.
        layouts: of samples for `causal_products` or `causal_attention`, and of others.

    Returns:
        [1, M, H, D], zeros for padding, and no weights.
    """
    if layouts is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
    short, long = layouts
    parts = []
    if isinstance(short, SampleSpans):
        parts.append(causal_attention(query, key, value, short, scaling=scaling))
    elif short is not None:
        parts.append(causal_products(query, key, value, short, scaling=scaling))
    if long is not None:
        parts.append(_attend(module, query, key, value, long, scaling, dropout))
    return (parts[0] if len(parts) == 1 else parts[0] + parts[1]), None


@torch.compiler.disable
def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, scaling: float, dropout: float
) -> Tensor:
    states = [layout.split(query, layout.query), layout.split(key, layout.key), layout.split(value, layout.key)]
    parts = []
    for part in zip(*states, strict=True):
        output, _ = sdpa_attention_forward(module, *part, None, scaling=scaling, dropout=dropout, is_causal=True)
        parts.append(output.transpose(1, 2))
    return layout.join(parts)


KERNEL_CALL = "kernel({}); Py_RETURN_NONE;"
"""How torch 2.13's bindings call a compiled kernel: with Python's lock held."""

UNLOCKED_KERNEL_CALL = """[](auto... arguments) {{
        struct Unlocked {{
            PyThreadState* state = PyEval_SaveThread();
            ~Unlocked() {{ PyEval_RestoreThread(state); }}
        }} unlocked;
        kernel(arguments...);
    }}({}); Py_RETURN_NONE;"""


def _release_lock_in_kernels() -> None:
    """Let other threads of Python run beside kernels that are compiled from now on, as beside torch's own operators.

    Else micro-batches side by side (`minivlm.train.lanes`) would wait for each other in all that is no product.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Bindings  # seconds of imports

    if Bindings.call_entry_function == KERNEL_CALL:
        Bindings.call_entry_function = UNLOCKED_KERNEL_CALL
    elif Bindings.call_entry_function != UNLOCKED_KERNEL_CALL:
        log.warning("this torch calls compiled kernels in another way: parallel_micro_batches will gain less")


def compile_model(vlm: MiniVLM, device: torch.device) -> None:
    """torch.compile each decoder layer and the loss of the head, in place. All layers share what is compiled.

    Where a CPU has bfloat16 units short samples attend by a kernel that is compiled too (`sample_attention`).

    Raises:
        ValueError: no C++ compiler or no headers of Python, which a CPU needs.
    """
    if device.type == "cpu":
        compiler, header = os.environ.get("CXX", "g++"), Path(sysconfig.get_path("include")) / "Python.h"
        if shutil.which(compiler) is None or not header.is_file():
            raise ValueError("torch.compile needs g++ and python3-dev: install them, or type train.compile=false")
    _release_lock_in_kernels()
    torch._dynamo.config.recompile_limit = 64  # at the usual 8 later shapes would run as they are, by order of arrival
    for layer in decoder_layers(vlm.language_model):
        layer.compile(dynamic=True)
    vlm.is_compiled = True
    vlm.logps_of = torch.compile(vlm.logps_of)  # dynamic=True would divide by the vocabulary's size in every loop
