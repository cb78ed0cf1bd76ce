"""Projector: picture features of the vision tower to embeddings of the language model. Called by `MiniVLM`."""

import torch
from torch import Tensor, nn

PROJECTOR_KINDS = ("linear", "mlp2x_gelu")


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
