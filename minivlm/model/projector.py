"""Projectors: picture features of the vision tower to embeddings of the language model. Called by `MiniVLM`.

`linear` and `mlp2x_gelu` give one token per feature; `pixel_shuffle` and `resampler` (model/resampler.py) give fewer.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minivlm.model.image_tokens import PROJECTOR_SIZES, patch_grid
from minivlm.model.resampler import ResamplerProjector

WHITENING_FLOOR = 0.1
"""Added to the variance of every direction before it is evened out, as a share of the mean variance: directions that
hold next to nothing but noise stay small."""


class LinearProjector(nn.Module):
    """One bias-free layer (LLaVA-1, MiniMind-V)."""

    def __init__(self, vision_size: int, text_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, text_size, bias=False)

    def forward(self, image_features: Tensor) -> Tensor:
        """[N, P, D_vision] -> [N, P, D_text]."""
        image_embeds: Tensor = self.linear_1(image_features)
        return image_embeds


class MlpProjector(nn.Module):
    """Two layers with a GELU between (LLaVA-1.5)."""

    def __init__(self, vision_size: int, text_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, text_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(text_size, text_size)

    def forward(self, image_features: Tensor) -> Tensor:
        """[N, P, D_vision] -> [N, P, D_text]."""
        image_embeds: Tensor = self.linear_2(self.act(self.linear_1(image_features)))
        return image_embeds


class PixelShuffleProjector(nn.Module):
    """Every square of neighbouring patches becomes one token, which then passes the two layers of `MlpProjector`.

    Source: Chen et al. 2024, arXiv:2404.16821 (InternVL 1.5), section 3.1; Laurencon et al. 2024, arXiv:2408.12637
    (Idefics3), section 2.1. Their squares tile the grid; what does not is filled as `pixel_shuffle` says (ours).
    """

    def __init__(self, vision_size: int, text_size: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.linear_1 = nn.Linear(factor**2 * vision_size, text_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(text_size, text_size)

    def forward(self, image_features: Tensor) -> Tensor:
        """[N, P, D_vision] -> [N, ceil(side / factor)^2, D_text]."""
        merged = pixel_shuffle(image_features, self.factor)
        image_embeds: Tensor = self.linear_2(self.act(self.linear_1(merged)))
        return image_embeds


Projector = LinearProjector | MlpProjector | PixelShuffleProjector | ResamplerProjector


def pixel_shuffle(image_features: Tensor, factor: int) -> Tensor:
    """Lay each square of factor x factor neighbouring patches into one vector, and leave a class token out.

    Squares stand row by row, and so do the patches within one. Where the grid is no multiple of the factor, its last
    row and column are repeated to the right and below (ViT-B/32 at 224 px: 7 x 7 patches become 8 x 8, with factor 2
    16 tokens): unlike zeros, repeated patches are what the projector sees elsewhere too.

    Args:
        image_features: [N, P, D], P a square or one more.

    Returns:
        [N, ceil(side / factor)^2, factor^2 * D].
    """
    side = patch_grid(image_features.shape[1])
    squares = -(-side // factor)
    patches = image_features[:, -(side**2) :].unflatten(1, (side, side))
    if squares * factor != side:
        place = torch.arange(squares * factor, device=patches.device).clamp(max=side - 1)
        patches = patches[:, place][:, :, place]
    split = patches.unflatten(2, (squares, factor)).unflatten(1, (squares, factor))
    return split.transpose(2, 3).flatten(3, 5).flatten(1, 2)


def build_projector(
    kind: str,
    vision_size: int,
    text_size: int,
    *,
    num_features: int = 0,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Projector:
    """A projector with random weights drawn from `seed`.

    Args:
        vision_size, text_size: widths of the features and of the language model.
        num_features: P, features per picture. Only `resampler` needs to know it.
        sizes: the `model` settings named in PROJECTOR_SIZES; `linear` and `mlp2x_gelu` read none.

    Raises:
        ValueError: unknown kind, or sizes that do not fit.
    """
    if kind not in PROJECTOR_SIZES:
        raise ValueError(
            f"model.projector is `{kind}`: type {' or '.join(f'model.projector={k}' for k in PROJECTOR_SIZES)}"
        )
    own = [(sizes or {})[name] for name in PROJECTOR_SIZES[kind]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "resampler":
            queries, layers, heads = own
            return ResamplerProjector(
                vision_size, text_size, num_features, num_queries=queries, num_layers=layers, num_heads=heads
            )
        if kind == "pixel_shuffle":
            return PixelShuffleProjector(vision_size, text_size, own[0])
        return LinearProjector(vision_size, text_size) if kind == "linear" else MlpProjector(vision_size, text_size)


def describe_projector(projector: nn.Module) -> tuple[str, dict[str, int]]:
    """Kind and sizes with which `build_projector` makes one of the same shape.

    Raises:
        ValueError: none of ours.
    """
    if isinstance(projector, LinearProjector):
        return "linear", {}
    if isinstance(projector, MlpProjector):
        return "mlp2x_gelu", {}
    if isinstance(projector, PixelShuffleProjector):
        return "pixel_shuffle", {"pixel_shuffle_factor": projector.factor}
    if isinstance(projector, ResamplerProjector):
        values = (len(projector.queries), len(projector.blocks), projector.num_heads)
        return "resampler", dict(zip(PROJECTOR_SIZES["resampler"], values, strict=True))
    raise ValueError(f"the projector {type(projector).__name__} is none of {', '.join(PROJECTOR_SIZES)}")


@torch.no_grad()
def whiten_input(projector: Projector, image_features: Tensor) -> None:
    """Change the random first layer so that all directions of the features start with about equal variance, and its
    outputs with variance 1.

    A few directions of a CLIP tower's patch tokens hold nearly all of their variance, and what else a patch shows is
    learned late. Any layer of the form W x + b can absorb the change, so nothing else differs afterwards. A bias-free
    layer cannot shift its input, so there the mean counts as variance.

    The first layer of `pixel_shuffle` reads several patches: each is evened out by itself, all alike. What neighbours
    have in common stays (a covariance over factor^2 * D directions would take hours). That of `resampler` makes what
    its keys and values are computed from.

    Args:
        image_features: [N, P, D_vision], a sample of what the projector will see.

    Source: whitening as data-dependent initialisation, Kraehenbuehl et al. 2015, arXiv:1511.06856.
    """
    layer, width = projector.linear_1, image_features.shape[-1]
    is_merged = isinstance(projector, PixelShuffleProjector)
    seen = pixel_shuffle(image_features, projector.factor) if is_merged else image_features
    flat = seen.reshape(-1, layer.in_features).double()
    mean = flat.mean(dim=0) if layer.bias is not None else torch.zeros_like(flat[0])
    centred = flat - mean
    patches = centred.reshape(-1, width)
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
    scales = (variances.clamp(min=0) + WHITENING_FLOOR * variances.mean().clamp(min=1e-6)).rsqrt()
    weight = layer.weight.double().reshape(-1, width) @ (directions * scales) @ directions.T
    weight = weight.reshape(layer.weight.shape)
    weight /= (centred @ weight.T).std().clamp(min=1e-6)
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.sub_((weight @ mean).to(layer.bias.dtype))
