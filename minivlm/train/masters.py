"""Float32 copies of bfloat16 weights for ZeRO-0, which DeepSpeed then trains like any module.

DeepSpeed's own FP16_UnfusedOptimizer goes over all gradients some times more, among others to look for the overflows
that only float16 has (docs/RESULTS.md). Called by `minivlm.train.engine`.
"""

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

CLIP_EPSILON = 1e-6
"""As torch.nn.utils.clip_grad_norm_."""

PIECE_ELEMENTS = 8_000_000
"""Gradients that are float32 at a time. All at once take 4 ms more for 27M parameters, and as much memory as these."""


class MasterWeights(torch.optim.Optimizer):
    """An optimizer of float32 copies, which gives their rounded values to the weights that compute.

    `param_groups` and `state` are those of the copies.
    """

    def __init__(self, working: Mapping[str, nn.Parameter], make: Callable[[Any], torch.optim.Optimizer]) -> None:
        """Keep the float32 values and let the weights compute in bfloat16 from now on.

        Args:
            working: what learns, by name; changed in place.
            make: from (name, copy) of each to their optimizer.
        """
        self.working = dict(working)
        self.masters = {name: nn.Parameter(weights.data) for name, weights in self.working.items()}
        for weights in self.working.values():
            weights.data = weights.data.bfloat16()
        self._optimizer = make(self.masters.items())
        super().__init__(self._optimizer.param_groups, {})
        self.param_groups, self.state = self._optimizer.param_groups, self._optimizer.state
        takes_all = any(group.get("use_muon") for group in self.param_groups)  # DeepSpeed's fills in missing gradients
        self._pieces = _pieces(self.masters, sys.maxsize if takes_all else PIECE_ELEMENTS)
        longest = max(sum(self.masters[name].numel() for name in names) for names in self._pieces)
        self._gradients = torch.empty(longest, device=next(iter(self.masters.values())).device)
        self._scale: Tensor | None = None

    @torch.no_grad()
    def clip(self, clip_norm: float) -> float:
        """Let the next step scale gradients down to a norm, if theirs is larger.

        Returns:
            Their norm, summed in float32.
        """
        squares = []
        for name in self.masters:
            gradient = self._in_float32([name])[0].flatten()
            squares.append(gradient @ gradient)  # on a CPU in a third of the time of linalg.vector_norm
        norm = torch.stack(squares).sum().sqrt()
        self._scale = clip_norm / (norm + CLIP_EPSILON) if float(norm) > clip_norm else None
        return float(norm)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the copies from the gradients of the weights, which are cleared, and round them into the weights."""
        for names in self._pieces:
            for name, gradient in zip(names, self._in_float32(names), strict=True):
                self.masters[name].grad = gradient if self._scale is None else gradient.mul_(self._scale)
                self.working[name].grad = None
            self._optimizer.step(closure)
            for name in names:
                self.working[name].copy_(self.masters[name])
                self.masters[name].grad = None

    def _in_float32(self, names: list[str]) -> list[Tensor]:
        """Gradients of some weights, in memory that the next call uses again."""
        sizes = [self.masters[name].numel() for name in names]
        parts = self._gradients[: sum(sizes)].split(sizes)
        shaped = [part.view_as(self.masters[name]) for name, part in zip(names, parts, strict=True)]
        for name, gradient in zip(names, shaped, strict=True):
            gradient.copy_(whole_gradient(self.working[name]))
        return shaped


def _pieces(masters: Mapping[str, nn.Parameter], limit: int) -> list[list[str]]:
    """Names in their order, each list of at most so many elements or of one parameter."""
    pieces: list[list[str]] = []
    room = 0
    for name, master in masters.items():
        if not pieces or master.numel() > room:
            pieces.append([])
            room = limit
        pieces[-1].append(name)
        room -= master.numel()
    return pieces


def whole_gradient(weights: nn.Parameter) -> Tensor:
    """The gradient; zeros where no micro-batch reached the weights, which then move on as with several workers."""
    if weights.grad is None:
        weights.grad = torch.zeros_like(weights)
    return weights.grad


def clip_gradients(parameters: Collection[nn.Parameter], clip_norm: float) -> float:
    """Scale gradients down together if their norm is larger; below that nothing is touched. Returns the norm before."""
    norm = nn.utils.get_total_norm([whole_gradient(weights) for weights in parameters])
    if float(norm) > clip_norm:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return float(norm)
