"""Float32 copies of bfloat16 weights for ZeRO-0, which DeepSpeed then trains like any module.

DeepSpeed's own FP16_UnfusedOptimizer goes over all gradients three times more, to look for the overflows that only
float16 has and for norms that clipping takes again (docs/RESULTS.md). Called by `minivlm.train.engine`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class MasterWeights(torch.optim.Optimizer):
    """An optimizer of float32 copies, which gives their rounded values to the weights that compute.

    `param_groups` and `state` are those of the copies.
    """

    def __init__(self, working: Mapping[str, nn.Parameter], make: Callable[[Any], torch.optim.Optimizer]) -> None:
        """Copy float32 weights and let them compute in bfloat16 from now on.

        Args:
            working: what learns, by name; changed in place.
            make: from (name, copy) of each to their optimizer.
        """
        self.working = dict(working)
        self.masters = {name: nn.Parameter(weights.detach().clone()) for name, weights in self.working.items()}
        for weights in self.working.values():
            weights.data = weights.data.bfloat16()
        self._optimizer = make(self.masters.items())
        super().__init__(self._optimizer.param_groups, {})
        self.param_groups, self.state = self._optimizer.param_groups, self._optimizer.state

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Move the gradients of the weights to their copies, in float32; their memory is kept for the next step."""
        for name, weights in self.working.items():
            master = self.masters[name]
            if weights.grad is None:
                master.grad = None
            elif master.grad is None:
                master.grad = weights.grad.float()
            else:
                master.grad.copy_(weights.grad)
            weights.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the copies from the gradients taken, and round them into the weights."""
        self._optimizer.step(closure)
        for name, weights in self.working.items():
            weights.copy_(self.masters[name])


def clip_gradients(parameters: Mapping[str, nn.Parameter], clip_norm: float) -> float:
    """Scale gradients down to a norm over all of them; returns the norm before. Below it nothing is touched."""
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    norm: Tensor = nn.utils.get_total_norm(gradients)
    if float(norm) > clip_norm:
        nn.utils.clip_grads_with_norm_(parameters.values(), clip_norm, norm)
    return float(norm)
