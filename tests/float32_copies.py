"""Float32 copies of bfloat16 weights against torch's AdamW of float32 weights."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from minivlm.train.masters import MasterWeights


def take_shares(weights: nn.Parameter) -> list[torch.Tensor]:
    """As of up to three lanes; halves and quarters add up to the same bfloat16."""
    gradient, weights.grad = weights.grad, None
    shares = {3: (1.0,), 4: (0.5, 0.5)}.get(len(weights), (0.5, 0.25, 0.25))
    return [] if gradient is None else [gradient * share for share in shares]


def check_float32_copies(kind: type[MasterWeights], clip_norm: float) -> None:
    """Copies, moments and what is rounded after three steps; weights that were not reached move on by their decay."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(size, 2, generator=generator) for size in (3, 4, 1, 5, 700)]
    gradients = [torch.randn(values.shape, generator=generator).bfloat16() for values in start]
    working, plain = ([nn.Parameter(values.clone()) for values in start] for _ in range(2))

    def groups(weights: list[nn.Parameter]) -> list[dict[str, object]]:
        return [{"params": weights[:3], "weight_decay": 0.2}, {"params": weights[3:], "weight_decay": 0.0}]

    optimizer = kind(groups(working), lambda groups: torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.99)))
    reference = torch.optim.AdamW(groups(plain), lr=0.1, betas=(0.9, 0.99))
    for step in range(3):
        for number, gradient in enumerate(gradients):
            is_reached = number != 1 or step == 1
            working[number].grad = gradient * (step + 1) if is_reached else None
            plain[number].grad = (gradient * (step + 1)).float() if is_reached else torch.zeros(gradient.shape)
        wanted = float(nn.utils.clip_grad_norm_(plain, clip_norm))
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 0.1 / (step + 1)
        assert optimizer.clip(clip_norm, take_shares) == pytest.approx(wanted, rel=1e-6)
        optimizer.step()
        reference.step()
        assert all(weights.grad is None for weights in working)
    for (weights, (copy, at)), values in zip(optimizer.places(), plain, strict=True):
        run = slice(at, at + values.numel())
        for mine, theirs in (
            (copy, values),
            *((optimizer.state[copy][key], reference.state[values][key]) for key in ("exp_avg", "exp_avg_sq")),
        ):
            assert_close(mine.detach().view(-1)[run].view_as(theirs), theirs.detach(), atol=1e-6, rtol=1e-6)
        assert torch.equal(weights, copy.detach().view(-1)[run].view_as(weights).bfloat16())
