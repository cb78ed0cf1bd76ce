"""How many tokens a picture becomes: arithmetic on the tower's and the projector's settings, without weights or torch.

Called wherever placeholders are counted: tokenizing, the dry run, exports.
"""

import math
from collections.abc import Mapping

from transformers import AutoConfig, PreTrainedConfig

PROJECTOR_SIZES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "mlp2x_gelu": (),
    "pixel_shuffle": ("pixel_shuffle_factor",),
    "resampler": ("resampler_queries", "resampler_layers", "resampler_heads"),
}
"""Projector kinds, and the `model` settings that only one of them reads."""

CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Tokens that a tower puts before its patches, by model_type; these are the towers that we run."""


def read_tower_config(path: str, *, local_files_only: bool = False) -> PreTrainedConfig:
    """Vision settings of a CLIP or SigLIP folder or hub id, whole models and vision halves alike.

    Args:
        local_files_only: of a hub id, look in the cache only.

    Raises:
        ValueError: no config.json there, or one of another architecture.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=local_files_only, trust_remote_code=False)
    except Exception as error:  # transformers and what it calls raise anything at a strange config.json
        raise ValueError(
            f"No vision tower under `{path}` ({first_line(error)}). Type clip.path=FOLDER with config.json, "
            "model.safetensors and preprocessor_config.json, or leave it out to train one"
        ) from error
    vision: PreTrainedConfig = config.vision_config if config.model_type in ("clip", "siglip") else config
    if vision.model_type not in CLASS_TOKENS:
        raise ValueError(
            f"`{path}` is a `{config.model_type}`, no CLIP or SigLIP. "
            "Type clip.path=openai/clip-vit-large-patch14-336, clip.path=google/siglip-base-patch16-224, or a folder"
        )
    return vision


def count_features(vision: PreTrainedConfig) -> int:
    """P, the feature vectors of one picture: CLIP's class token, then the patches row by row.

    Raises:
        ValueError: a tower whose input or patches are not square.
    """
    sides = (vision.image_size, vision.patch_size)
    if not all(isinstance(side, int) for side in sides) or not 1 <= sides[1] <= sides[0]:
        raise ValueError(
            f"the vision tower reads {sides[0]} px in patches of {sides[1]} px: only squares are supported"
        )
    return int((sides[0] // sides[1]) ** 2 + CLASS_TOKENS[vision.model_type])


def patch_grid(num_features: int) -> int:
    """Patches along a side. P or P - 1 is a square, never both, so P itself tells whether there is a class token."""
    side = math.isqrt(num_features)
    if num_features < 1 or num_features - side**2 > 1:
        raise ValueError(f"{num_features} features per picture are no square of patches, with or without a class token")
    return side


def count_image_tokens(kind: str, num_features: int, sizes: Mapping[str, int]) -> int:
    """Tokens that one picture becomes behind a projector.

    Args:
        kind: one of PROJECTOR_SIZES.
        num_features: P of the tower.
        sizes: the `model` settings that the kind reads.

    Raises:
        ValueError: a pixel-shuffle factor above the number of patches along a side.
    """
    if kind == "resampler":
        return sizes["resampler_queries"]
    if kind == "pixel_shuffle":
        side, factor = patch_grid(num_features), sizes["pixel_shuffle_factor"]
        if factor > side:
            raise ValueError(
                f"model.pixel_shuffle_factor={factor} does not fit into the tower's {side} x {side} patches: "
                f"type model.pixel_shuffle_factor={min(2, side)}" + (f" to {side}" if side > 2 else "")
            )
        return (-(-side // factor)) ** 2
    return num_features


def first_line(error: Exception) -> str:
    """What an error says, or its name where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
