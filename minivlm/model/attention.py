"""How much an answer looks at each token of its pictures, and where those tokens lie in the picture.

The prompt is read as in generation; only the few queries that decide the answer run with eager attention, so that the
weights in memory are layers x heads x answer x prompt and never prompt x prompt.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from minivlm.model.generate import Prompt
from minivlm.model.image_tokens import patch_grid
from minivlm.model.projector import describe_projector
from minivlm.model.vlm import MiniVLM, document_mask


@torch.inference_mode()
def answer_attention(vlm: MiniVLM, prompt: Prompt, answer_ids: Sequence[int]) -> Tensor:
    """Attention of an answer to the image tokens of its prompt.

    The queries are the positions that decide the answer's tokens (the last one of the prompt, then the answer but its
    last token). Averaged over them, over all heads, and over the upper half of the layers (from layer L // 2 on): the
    lower ones gather the text around each token, and which head points is different in every model, so none is picked.

    Returns:
        [n, tokens of a picture] float32 on the CPU, a share of all attention: 1 minus the sum went to text.

    Raises:
        ValueError: an empty prompt, placeholders unlike the pictures, or a language model without attention weights.
    """
    if not prompt.input_ids:
        raise ValueError("the prompt is empty: it must end in the assistant header")
    device = next(vlm.parameters()).device
    ids = torch.tensor([[*prompt.input_ids, *answer_ids[:-1]]], device=device)
    features = prompt.image_features.to(device)
    embeds = vlm.embed(ids, features, torch.arange(len(features), device=device))
    start, length = len(prompt.input_ids) - 1, ids.shape[1]
    mask = document_mask(torch.ones_like(ids), embeds.dtype)
    places = torch.arange(length, device=device)[None]
    decoder = vlm.language_model.get_decoder()
    cache = DynamicCache()
    if start > 0:
        decoder(
            inputs_embeds=embeds[:, :start],
            attention_mask=mask[..., :start, :start],
            position_ids=places[:, :start],
            past_key_values=cache,
            use_cache=True,
        )
    usual = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")  # the only one that returns its weights
    try:
        outputs = decoder(
            inputs_embeds=embeds[:, start:],
            attention_mask=mask[..., start:, :],
            position_ids=places[:, start:],
            past_key_values=cache,
            use_cache=True,
            output_attentions=True,
        )
    finally:
        decoder.set_attn_implementation(usual)
    layers = outputs.attentions
    if not layers or any(layer is None for layer in layers):
        raise ValueError(
            f"{type(decoder).__name__} returns no attention weights: evaluate without them, evaluation.heat_maps=0"
        )
    weights = torch.stack([layer[0].float().mean(dim=(0, 1)) for layer in layers[len(layers) // 2 :]]).mean(dim=0)
    is_image = ids[0] == vlm.image_token_id
    return weights[is_image].cpu().reshape(len(features), -1)


def token_grid(weights: Tensor, projector: nn.Module, num_features: int) -> Tensor | None:
    """Lay the image tokens of one picture out as the tower's patches.

    Args:
        weights: [tokens of a picture].
        projector: what made the tokens.
        num_features: P of the tower, with or without a class token.

    Returns:
        [side, side], rows from the top; a class token is left out, and a token that stands for several patches gives
        each the same share. None where tokens have no place (a resampler's queries look at all patches).
    """
    kind, sizes = describe_projector(projector)
    side = patch_grid(num_features)
    if kind == "resampler":
        return None
    if kind == "pixel_shuffle":
        factor, cells = sizes["pixel_shuffle_factor"], math.isqrt(len(weights))
        grid = weights.reshape(cells, cells) / factor**2
        return grid.repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1)[:side, :side]
    return weights[len(weights) - side**2 :].reshape(side, side)
