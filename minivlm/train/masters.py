"""Float32 copies of bfloat16 weights for ZeRO-0, which DeepSpeed then trains like any module.

DeepSpeed's own FP16_UnfusedOptimizer goes over all gradients some times more, among others to look for the overflows
that only float16 has (docs/RESULTS.md). Called by `minivlm.train.engine`.
"""

import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from minivlm.train.optimizer import Groups

CLIP_EPSILON = 1e-6
"""As torch.nn.utils.clip_grad_norm_."""

ALIGNED_ELEMENTS = 32
"""Within a piece weights start at a multiple of these: 64 bytes of bfloat16, as memory of their own would."""


TakeGradients = Callable[[nn.Parameter], Sequence[Tensor]]
"""Of some weights: their gradients, still to be added up, and no longer theirs (`Lanes.take_gradients`)."""


class Piece:
    """Weights of one group that are updated together, one after the other in memory; a single one keeps its shape."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        """Keep the float32 values and let the weights compute in bfloat16 from now on."""
        self.weights = weights
        sizes = [-(-one.numel() // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS for one in weights[:-1]]
        self.offsets = list(accumulate(sizes, initial=0))
        shape = weights[0].shape if len(weights) == 1 else (self.offsets[-1] + weights[-1].numel(),)
        self.master = nn.Parameter(weights[0].new_zeros(shape))
        for one, values in zip(weights, self.parts(self.master.detach()), strict=True):
            values.copy_(one.detach())
        self.rounded = self.master.detach().bfloat16()
        for one, values in zip(weights, self.parts(self.rounded), strict=True):
            one.data = values
        self.gradient = torch.zeros_like(self.rounded)

    def parts(self, whole: Tensor) -> list[Tensor]:
        """The weights' parts of a tensor laid out as `master`, each in its shape."""
        flat = whole.view(-1)
        return [flat[at : at + one.numel()].view_as(one) for at, one in zip(self.offsets, self.weights, strict=True)]

    def take_gradient(self, take: TakeGradients) -> None:
        """Move that of the weights to `gradient`; 0 where no micro-batch reached them."""
        for one, values in zip(self.weights, self.parts(self.gradient), strict=True):
            found = take(one)
            if len(found) < 2:
                values.copy_(found[0] if found else torch.zeros(()))
                continue
            torch.add(found[0], found[1], out=values)
            for another in found[2:]:
                values += another


class MasterWeights(torch.optim.Optimizer):
    """An optimizer of float32 copies, which gives their rounded values to the weights that compute.

    `param_groups` and `state` are those of the copies.
    """

    piece_elements = 8_000_000
    """Weights that are updated at a time. All 27M at once take 4 ms more, and as much memory for float32 gradients."""

    def __init__(self, groups: Groups, make: Callable[[Groups], torch.optim.Optimizer]) -> None:
        """Keep the float32 values and let the weights compute in bfloat16 from now on.

        Args:
            groups: what learns; the weights move to other memory.
            make: from such groups of copies to their optimizer.
        """
        takes_all = any(group.get("use_muon") for group in groups)  # DeepSpeed's fills in missing gradients
        self.pieces: list[Piece] = []
        copies: Groups = []
        for group in groups:
            pieces = [Piece(part) for part in _divide(group["params"], 1 if takes_all else self.piece_elements)]
            copies.append({**group, "params": [piece.master for piece in pieces]})
            self.pieces += pieces
        self._optimizer = make(copies)
        super().__init__(self._optimizer.param_groups, {})
        self.param_groups, self.state = self._optimizer.param_groups, self._optimizer.state
        self._turns = [self.pieces] if takes_all else [[piece] for piece in self.pieces]
        self._float32: Tensor | None = None
        self._scale = 1.0

    def places(self) -> Iterator[tuple[nn.Parameter, tuple[nn.Parameter, int]]]:
        """Of all that learns: the weights, their copy, and the first of their elements in it."""
        for piece in self.pieces:
            for weights, offset in zip(piece.weights, piece.offsets, strict=True):
                yield weights, (piece.master, offset)

    @torch.no_grad()
    def clip(self, clip_norm: float, take: TakeGradients) -> float:
        """Take the weights' gradients, add them up, and let the next step scale them to a norm if theirs is larger.

        Returns:
            Their norm, summed in float32.
        """
        for piece in self.pieces:
            piece.take_gradient(take)
        norm = torch.stack([self._square_sum(piece) for piece in self.pieces]).sum().sqrt()
        self._scale = float(clip_norm / (norm + CLIP_EPSILON)) if float(norm) > clip_norm else 1.0
        return float(norm)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the copies from the gradients that `clip` took, and round them into the weights."""
        for pieces in self._turns:
            for piece, gradient in zip(pieces, self._in_float32(pieces), strict=True):
                piece.master.grad = gradient if self._scale == 1 else gradient.mul_(self._scale)
            self._optimizer.step(closure)
            for piece in pieces:
                piece.rounded.copy_(piece.master)
                piece.master.grad = None

    def _square_sum(self, piece: Piece) -> Tensor:
        gradient = self._in_float32([piece])[0].view(-1)
        return gradient @ gradient  # on a CPU in a third of the time of linalg.vector_norm

    def _in_float32(self, pieces: list[Piece]) -> list[Tensor]:
        """Gradients of some pieces, in memory that the next call uses again."""
        if self._float32 is None:
            longest = max(sum(piece.master.numel() for piece in turn) for turn in self._turns)
            self._float32 = pieces[0].master.new_empty(longest)
        sizes = [piece.master.numel() for piece in pieces]
        parts = self._float32[: sum(sizes)].split(sizes)
        return [part.view_as(piece.master).copy_(piece.gradient) for piece, part in zip(pieces, parts, strict=True)]


class CompiledAdamW(MasterWeights):
    """The same for AdamW by two compiled passes over memory, for the norm and for all the rest."""

    piece_elements = sys.maxsize  # gradients stay bfloat16, and every piece costs 0.7 ms of calls

    def __init__(self, groups: Groups, make: Callable[[Groups], torch.optim.Optimizer]) -> None:
        """As `MasterWeights`; `make` gives a torch.optim.AdamW, whose groups and state are used."""
        super().__init__(groups, make)
        self._sum, self._pass = torch.compile(_square_sum, dynamic=True), torch.compile(_adamw_pass, dynamic=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the copies from the gradients that `clip` took, and round them into the weights."""
        groups = {id(master): group for group in self.param_groups for master in group["params"]}
        for piece in self.pieces:
            group, state = groups[id(piece.master)], self.state[piece.master]
            if not state:
                state.update(
                    step=torch.tensor(0.0),
                    exp_avg=torch.zeros_like(piece.master),
                    exp_avg_sq=torch.zeros_like(piece.master),
                )
            state["step"] += 1
            (beta1, beta2), count, rate = group["betas"], int(state["step"]), group["lr"]
            factors = [
                self._scale,
                1 - rate * group["weight_decay"],
                1 - beta1,
                beta2,
                1 - beta2,
                rate / (1 - beta1**count),
                1 / math.sqrt(1 - beta2**count),
                group["eps"],
            ]
            moved = (piece.master.detach(), state["exp_avg"], state["exp_avg_sq"], piece.rounded)
            self._pass(*(tensor.view(-1) for tensor in (*moved, piece.gradient)), torch.tensor(factors))

    def _square_sum(self, piece: Piece) -> Tensor:
        total: Tensor = self._sum(piece.gradient.view(-1))
        return total


def _square_sum(gradient: Tensor) -> Tensor:
    return gradient.float().square().sum()


def _adamw_pass(
    weights: Tensor, mean: Tensor, square: Tensor, rounded: Tensor, gradient: Tensor, factors: Tensor
) -> None:
    """Loshchilov and Hutter 2019, arXiv:1711.05101, as torch.optim.AdamW computes it; all but gradient is changed."""
    scale, keep, mean_share, square_keep, square_share, rate, correction, epsilon = factors.unbind()
    gradient = gradient.float() * scale
    mean.lerp_(gradient, mean_share)
    square.mul_(square_keep).add_(gradient.square() * square_share)
    weights.mul_(keep).sub_(rate * mean / (square.sqrt() * correction + epsilon))
    rounded.copy_(weights)


def _divide(weights: list[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """In their order, each list of at most so many elements or of one parameter."""
    parts: list[list[nn.Parameter]] = []
    room = 0
    for one in weights:
        if not parts or one.numel() > room:
            parts.append([])
            room = limit
        parts[-1].append(one)
        room -= one.numel()
    return parts


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
