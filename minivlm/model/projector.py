"""Projector: picture features of the vision tower to embeddings of the language model. Called by `MiniVLM`."""

import torch
from torch import Tensor, nn

PROJECTOR_KINDS = ("linear", "mlp2x_gelu")
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


def build_projector(kind: str, vision_size: int, text_size: int, *, seed: int = 0) -> LinearProjector | MlpProjector:
    """A projector with random weights drawn from `seed`. Both kinds keep the number of image tokens.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in PROJECTOR_KINDS:
        raise ValueError(f"model.projector is `{kind}`: type model.projector=linear or model.projector=mlp2x_gelu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LinearProjector(vision_size, text_size) if kind == "linear" else MlpProjector(vision_size, text_size)


@torch.no_grad()
def whiten_input(projector: LinearProjector | MlpProjector, image_features: Tensor) -> None:
    """Change the random first layer so that all directions of the features start with about equal variance, and its
    outputs with variance 1.

    A few directions of a CLIP tower's patch tokens hold nearly all of their variance, and what else a patch shows is
    learned late. Any layer of the form W x + b can absorb the change, so nothing else differs afterwards. A bias-free
    layer cannot shift its input, so there the mean counts as variance.

    Args:
        image_features: [N, P, D_vision], a sample of what the projector will see.

    Source: whitening as data-dependent initialisation, Kraehenbuehl et al. 2015, arXiv:1511.06856.
    """
    layer = projector.linear_1
    flat = image_features.reshape(-1, image_features.shape[-1]).double()
    mean = flat.mean(dim=0) if layer.bias is not None else torch.zeros_like(flat[0])
    centred = flat - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    scales = (variances.clamp(min=0) + WHITENING_FLOOR * variances.mean().clamp(min=1e-6)).rsqrt()
    weight = layer.weight.double() @ (directions * scales) @ directions.T
    weight /= (centred @ weight.T).std().clamp(min=1e-6)
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.sub_((weight @ mean).to(layer.bias.dtype))
