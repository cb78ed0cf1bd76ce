"""The last layer of a language model, for the tokens that the head reads only: nobody looks at the others' output.

On captions these are a quarter of all. Keys and values are computed for every token; queries, the output of attention
and the feed-forward part for the read ones. Values and gradients are those of the stock layer. Put
into a model by `minivlm.model.fast_layers`.
"""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from minivlm.model.read_tokens import ReadTokens, spread, take


def forward_read(layer: nn.Module, hidden_states: Tensor, read: ReadTokens | None = None, **attention: Any) -> Tensor:
    """In the place of `forward` of llama's, qwen2's and qwen3's layers.

    Args:
        hidden_states: [1, M, D].
        read: of a line of M tokens; None = all, as the stock layer.

    Returns:
        [1, R, D].
    """
    normed = layer.input_layernorm(hidden_states)
    if read is None:
        mixed, _ = layer.self_attn(hidden_states=normed, **attention)
    else:
        mixed = _attend(layer.self_attn, normed, read, **attention)
        hidden_states = take(hidden_states, read)
    hidden_states = hidden_states + mixed
    output: Tensor = hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
    return output


def _attend(
    attention: nn.Module,
    hidden_states: Tensor,
    read: ReadTokens,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    **others: Any,
) -> Tensor:
    """The stock attention, [1, M, D] -> [1, R, D]. Other tokens' queries are 0, and what they mix is dropped."""

    def by_head(states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, attention.head_dim))

    query = by_head(attention.q_proj(take(hidden_states, read)))
    key, value = by_head(attention.k_proj(hidden_states)), by_head(attention.v_proj(hidden_states))
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query = by_head(spread(query.flatten(2), read))
    query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
    mixed, _ = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation](
        attention,
        query,
        key,
        value.transpose(1, 2),
        attention_mask,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        **others,
    )
    output: Tensor = attention.o_proj(take(mixed.flatten(2), read))
    return output
