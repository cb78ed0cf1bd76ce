"""A CLIP of our own: built from sizes, trained contrastively by the clip job, saved as a stock `CLIPModel` folder."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

LEGACY_EOS = 2

POSITION_STD = 0.5
"""Of the vision tower's initial position embeddings. With the stock 0.02 the patch tokens of a briefly trained tower
carry next to nothing of their place (a linear probe finds the cell in 17 % instead of 100 %)."""


def build_clip(
    *,
    image_size: int,
    patch_size: int,
    vision_hidden_size: int,
    vision_layers: int,
    vision_heads: int,
    text_hidden_size: int,
    text_layers: int,
    text_heads: int,
    max_text_tokens: int,
    projection_dim: int,
    vocab_size: int,
    bos_token_id: int,
    eos_token_id: int,
    pad_token_id: int,
    seed: int,
) -> CLIPModel:
    """A float32 CLIP with random weights; feed-forward layers are four times as wide as the hidden size.

    Args:
        image_size, patch_size: in pixels.
        max_text_tokens: longest caption, end token included.
        eos_token_id: the text embedding is read at its first occurrence, so every caption must contain it. It may be
            the padding token.

    Raises:
        ValueError: eos_token_id is 2, which makes transformers read the text at its highest id instead.
    """
    if eos_token_id == LEGACY_EOS:
        raise ValueError(
            "CLIP's eos_token_id is 2, for which transformers keeps an old rule (the highest id of a caption is taken "
            "as its end). End captions with another special token, for example <|endoftext|>"
        )
    vision = CLIPVisionConfig(
        hidden_size=vision_hidden_size,
        intermediate_size=4 * vision_hidden_size,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_heads,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=projection_dim,
    )
    text = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=text_hidden_size,
        intermediate_size=4 * text_hidden_size,
        num_hidden_layers=text_layers,
        num_attention_heads=text_heads,
        max_position_embeddings=max_text_tokens,
        projection_dim=projection_dim,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    config = CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=projection_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
        model.vision_model.embeddings.position_embedding.weight.data.normal_(std=POSITION_STD)
    return model


def clip_image_processor(image_size: int) -> CLIPImageProcessorPil:
    """CLIP's own preprocessing (shortest side resized bicubically, centre crop, OpenAI mean and std) at this size."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )


def save_clip(model: CLIPModel, directory: Path) -> None:
    """Write a folder that `VisionTower.load`, `CLIPModel` and `CLIPImageProcessor` read."""
    model.save_pretrained(str(directory))
    clip_image_processor(model.config.vision_config.image_size).save_pretrained(str(directory))


def clip_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, is_duplicate: Tensor) -> Tensor:
    """Symmetric contrastive loss over a batch of pairs.

    Pairs whose captions say the same thing are no negatives of each other: they are left out of the softmax.

    Args:
        image_embeds, text_embeds: [B, D] of the whole (gathered) batch; normalised here.
        logit_scale: scalar, the logarithm of the inverse temperature, as `CLIPModel` holds it.
        is_duplicate: [B, B] bool, True where caption i equals caption j. The diagonal is ignored.

    Returns:
        Scalar: mean over pairs of both directions.

    Source: Radford et al. 2021, arXiv:2103.00020, Figure 3; the left-out duplicates are ours.
    """
    image_embeds = functional.normalize(image_embeds.float(), dim=-1)
    text_embeds = functional.normalize(text_embeds.float(), dim=-1)
    logits = logit_scale.exp() * image_embeds @ text_embeds.T
    others = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(is_duplicate & others, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
