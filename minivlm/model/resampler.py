"""The cross-attention resampler: a fixed number of learned queries read a picture's features, each gives one token.

Made by `build_projector`. Pre-norm and without biases inside, as the Perceiver resampler is.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from minivlm.model.image_tokens import patch_grid

FEED_FORWARD_FACTOR = 4
POSITION_PERIOD = 10_000.0


class ResamplerBlock(nn.Module):
    """Queries look at the features and at each other, then pass a feed-forward layer; both are added to them."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_queries = nn.LayerNorm(width)
        self.norm_features = nn.LayerNorm(width)
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key_value = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.up = nn.Linear(width, FEED_FORWARD_FACTOR * width, bias=False)
        self.down = nn.Linear(FEED_FORWARD_FACTOR * width, width, bias=False)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """queries [N, Q, W], features [N, P, W] -> [N, Q, W]."""
        normed = self.norm_queries(queries)
        keys, values = self.to_key_value(torch.cat([self.norm_features(features), normed], dim=1)).chunk(2, dim=-1)
        heads = (self._split(self.to_query(normed)), self._split(keys), self._split(values))
        attended = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        queries = queries + self.to_out(attended)
        updated: Tensor = queries + self.down(functional.gelu(self.up(self.norm_feed_forward(queries))))
        return updated

    def _split(self, states: Tensor) -> Tensor:
        """[N, L, W] -> [N, heads, L, W / heads]."""
        return states.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class ResamplerProjector(nn.Module):
    """Features and their places in the grid -> keys and values; learned queries -> tokens.

    Raises:
        ValueError: a language model whose width the heads do not divide, or that is no multiple of 4.

    Source: Alayrac et al. 2022, arXiv:2204.14198 (Flamingo), section 3.1.1 and appendix A.1.1: the blocks. Bai et al.
    2023, arXiv:2308.12966 (Qwen-VL), section 2.1: fixed two-dimensional positions at the features.
    """

    positions: Tensor

    def __init__(
        self, vision_size: int, text_size: int, num_features: int, *, num_queries: int, num_layers: int, num_heads: int
    ) -> None:
        super().__init__()
        if text_size % num_heads or text_size % 4:
            fitting = [heads for heads in (2, 4, 8, 16) if text_size % heads == 0]
            raise ValueError(
                f"model.resampler_heads={num_heads} must divide the language model's width {text_size}, itself a "
                f"multiple of 4: type model.resampler_heads={max((h for h in fitting if h <= num_heads), default=1)}"
            )
        self.num_heads = num_heads
        self.linear_1 = nn.Linear(vision_size, text_size)
        self.register_buffer("positions", grid_positions(num_features, text_size), persistent=False)
        self.queries = nn.Parameter(torch.randn(num_queries, text_size))
        self.blocks = nn.ModuleList(ResamplerBlock(text_size, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(text_size)
        self.linear_2 = nn.Linear(text_size, text_size)

    def forward(self, image_features: Tensor) -> Tensor:
        """[N, P, D_vision] -> [N, queries, D_text]."""
        features = self.linear_1(image_features)
        features = features + self.positions.to(features.dtype)  # engines cast parameters, not all of them buffers
        queries = self.queries.expand(len(features), -1, -1)
        for block in self.blocks:
            queries = block(queries, features)
        image_embeds: Tensor = self.linear_2(self.norm(queries))
        return image_embeds


def grid_positions(num_features: int, width: int) -> Tensor:
    """Where each feature stands in the grid: [P, width] float32, width a multiple of 4; a class token gets zeros.

    The first half tells the row and the second the column, each by sines and cosines of falling frequency.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5, once for each axis.
    """
    side = patch_grid(num_features)
    rates = POSITION_PERIOD ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return functional.pad(grid, (0, 0, num_features - side**2, 0))
