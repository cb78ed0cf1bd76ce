"""Language models of MiniMind (`*_llm.pth` and the like) -> a stock Llama or Qwen3. Called by `jobs.import_minimind`.

Layouts are seen from the weights' names (jingyaogong/minimind, model/model.py and model/model_minimind.py):

| layout | its mark | stock class | heads | RoPE |
|---|---|---|---|---|
| v1, 2024 | `layers.0.attention.wq`, 2 queries a key | Llama | 16 and 8 | pairs of neighbours, theta 1e4 |
| MiniMind2, early 2025 | the same, 4 queries a key | Llama | 8 and 2 | pairs of neighbours, theta 1e6 |
| 2025 | `model.layers.0.self_attn.q_proj` | Llama | 8 and 2 | halves, theta 1e6 |
| 2026 | the same with `q_norm` | Qwen3 | by the width of `q_norm` | halves, theta 1e6 |

tok_embeddings -> model.embed_tokens; attention.wq wk wv wo -> self_attn.q_proj k_proj v_proj o_proj; feed_forward.w1
w3 w2 -> mlp.gate_proj up_proj down_proj; attention_norm, ffn_norm -> input_layernorm, post_attention_layernorm;
output -> lm_head. Stock classes rotate halves, so the rows of wq and wk are put in that order. Buffers (`mask`,
`pos_cis`, `freqs_cos`, `freqs_sin`) are computed, not read.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

BUFFERS = re.compile(r"(?:^|\.)(?:mask|pos_cis|freqs_cos|freqs_sin)$")
EARLY_NAMES = (
    (r"^tok_embeddings\.", "model.embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"^norm\.", "model.norm."),
    (r"^layers\.", "model.layers."),
    (r"\.attention\.w([qkvo])\.", r".self_attn.\1_proj."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
)
QUERY_HEADS_PER_KEY_HEAD_V1 = 2
"""v1 has 16 and 8 heads; everything later without `q_norm` 8 and 2."""


@dataclass(frozen=True)
class Heads:
    """What the weights' shapes do not say."""

    num_attention_heads: int
    rope_theta: float


def load_minimind(path: Path, heads: Heads | None = None) -> PreTrainedModel:
    """A MiniMind checkpoint as a stock float32 model; every weight is used and none is missing.

    Args:
        path: a state dict; only tensors are unpickled.
        heads: of a model of other than the published sizes.

    Raises:
        ValueError: not such a file, a mixture of experts, or weights that do not fit.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a PyTorch checkpoint of tensors ({str(error).splitlines()[0][:160]})") from None
    except Exception as error:  # pickle.UnpicklingError and its kin
        raise ValueError(f"{path}: holds more than tensors, so it is not opened ({type(error).__name__})") from None
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path}: not a state dict of names and tensors")
    try:
        return from_state_dict(dict(weights), heads)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: no MiniMind language model ({type(error).__name__}: {error})") from None


def from_state_dict(weights: dict[str, Tensor], heads: Heads | None = None) -> PreTrainedModel:
    """As `load_minimind`, from tensors in memory."""
    is_early = "tok_embeddings.weight" in weights
    named = {_stock_name(name): value.float() for name, value in weights.items() if not BUFFERS.search(name)}
    if experts := next((name for name in named if ".experts." in name or ".gate." in name), None):
        raise ValueError(f"a mixture of experts ({experts}): only dense models are imported")
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        if name not in named:
            raise ValueError(f"no MiniMind language model: `{name}` is missing")
    config = _config(named, heads, is_early)
    if is_early:
        for name in [name for name in named if name.endswith(("q_proj.weight", "k_proj.weight"))]:
            named[name] = halves_from_pairs(named[name], config.head_dim)
    if config.tie_word_embeddings:
        named.pop("lm_head.weight", None)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    expected = {name for name, _ in model.named_parameters()}
    if named.keys() != expected:
        missing, left = sorted(expected - named.keys()), sorted(named.keys() - expected)
        raise ValueError(f"{len(missing)} weights are missing {missing[:2]}, {len(left)} are left over {left[:2]}")
    try:
        model.load_state_dict(named, strict=False)  # a tied head is in it once
    except RuntimeError as error:
        raise ValueError(f"shapes do not fit: {str(error).splitlines()[-1].strip()}") from None
    return model


def halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows [heads * head_dim, D] for a RoPE of neighbouring pairs -> the order for a RoPE of halves.

    Row 2i of a head becomes row i, row 2i+1 row i + head_dim/2: dot products of queries and keys stay as they are.
    """
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _stock_name(name: str) -> str:
    for pattern, stock in EARLY_NAMES:
        name = re.sub(pattern, stock, name)
    return name


def _config(named: Mapping[str, Tensor], heads: Heads | None, is_early: bool) -> PreTrainedConfig:
    embedding = named["model.embed_tokens.weight"]
    queries, keys = (named[f"model.layers.0.self_attn.{x}_proj.weight"].shape[0] for x in "qk")
    norm = named.get("model.layers.0.self_attn.q_norm.weight")
    if norm is not None:
        heads = Heads(queries // norm.shape[0], heads.rope_theta if heads else 1e6)
    elif heads is None:
        heads = Heads(16, 1e4) if is_early and queries == QUERY_HEADS_PER_KEY_HEAD_V1 * keys else Heads(8, 1e6)
    head_dim, rest = divmod(queries, heads.num_attention_heads)
    if rest or keys % head_dim or head_dim % 2:
        raise ValueError(f"{heads.num_attention_heads} heads do not fit {queries} query and {keys} key rows")
    head = named.get("lm_head.weight")
    layers = {int(found.group(1)) for name in named if (found := re.match(r"model\.layers\.(\d+)\.", name))}
    sizes = {
        "vocab_size": embedding.shape[0],
        "hidden_size": embedding.shape[1],
        "intermediate_size": named["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": heads.num_attention_heads,
        "num_key_value_heads": keys // head_dim,
        "head_dim": head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": heads.rope_theta},
        "rms_norm_eps": 1e-6 if norm is not None else 1e-5,
        "tie_word_embeddings": head is None or torch.equal(head, embedding),
        "max_position_embeddings": 32_768 if norm is not None else 8_192,
    }
    return Qwen3Config(**sizes) if norm is not None else LlamaConfig(**sizes)
