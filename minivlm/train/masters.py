"""Float32 copies of bfloat16 weights for ZeRO-0, which DeepSpeed then trains like any module.

DeepSpeed's own FP16_UnfusedOptimizer goes over all gradients some times more, among others to look for the overflows
that only float16 has (docs/RESULTS.md). Called by `minivlm.train.engine`.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn


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

    @torch.no_grad()
    def take_gradients(self) -> Tensor:
        """Move the gradients of the weights to their copies, in float32; their memory is kept for the next step.

        Returns:
            The norm over all of them, taken of each while it is in the cache.
        """
        norms = []
        for name, weights in self.working.items():
            master = self.masters[name]
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            master.grad.copy_(whole_gradient(weights))
            weights.grad = None
            norms.append(torch.linalg.vector_norm(master.grad))
        return torch.linalg.vector_norm(torch.stack(norms))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the copies from the gradients taken, and round them into the weights."""
        self._optimizer.step(closure)
        for name, weights in self.working.items():
            weights.copy_(self.masters[name])


def whole_gradient(weights: nn.Parameter) -> Tensor:
    """The gradient; zeros where no micro-batch reached the weights, which then move on as with several workers."""
    if weights.grad is None:
        weights.grad = torch.zeros_like(weights)
    return weights.grad


def clip_gradients(parameters: Collection[nn.Parameter], norm: Tensor, clip_norm: float) -> None:
    """Scale gradients down from their norm over all of them to another; below that nothing is touched."""
    if float(norm) > clip_norm:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
