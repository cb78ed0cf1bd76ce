"""Samples in one line, as attention by sample takes them."""

import torch
from torch import Tensor

LENGTHS = (5, 40, 1, 33, 32, 64)
"""Two groups: 32 and 64 tokens wide."""


def line_of(lengths: tuple[int, ...], padding: int = 3) -> Tensor:
    """[1, M] segment ids."""
    ids = [number for number, length in enumerate(lengths, start=1) for _ in range(length)]
    return torch.tensor([ids + [0] * padding])


def states(num_tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries of four heads, keys and values of two, laid out as a projection leaves them."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, num_tokens, heads, 8, generator=generator).to(dtype).transpose(1, 2) for heads in (4, 2, 2)]
