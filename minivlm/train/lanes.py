"""Micro-batches of a step side by side on a CPU: a thread and a twin of the model for each, with the same weights.

Two threads within every operation wait for each other some thousand times a step, and what interrupts one stops both;
with a micro-batch of their own they meet once (docs/RESULTS.md). Pure torch. Called by `minivlm.train.engine`.
"""

import contextvars
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from minivlm.model.fast_layers import compile_model
from minivlm.model.vlm import MiniVLM

Item = TypeVar("Item")
Result = TypeVar("Result")


class Lanes:
    """Lane 0 is the thread that calls, with the model itself; the others have twins with gradients of their own.

    The result depends on the number of lanes as on that of workers: in the last digits.
    """

    def __init__(self, model: MiniVLM, count: int, *, is_compiled: bool) -> None:
        """
        Args:
            count: lanes; they share out torch's threads of the calling thread (`torch.set_num_threads`).
            is_compiled: the model's layers are compiled; those of twins then are too.
        """
        self.modules = [model, *(_twin(model, is_compiled) for _ in range(count - 1))]
        """The model of each lane."""
        parameters = zip(*(module.parameters() for module in self.modules), strict=True)
        self._twins = {id(same[0]): same for same in parameters}
        self._threads = max(1, torch.get_num_threads() // count)
        self._pools = [ThreadPoolExecutor(1, "lane", torch.set_num_threads, (self._threads,)) for _ in range(1, count)]
        self._is_first_run = True

    def run(self, work: Callable[[int, Item], Result], items: Sequence[Item]) -> list[Result]:
        """`work(lane, item)` for each, item i in lane i % count, those of a lane in their order.

        The first run takes the lanes in turn, so that what most steps need is compiled once.

        Returns:
            Results in the order of the items.
        """
        count = len(self.modules)
        if count == 1:
            return [work(0, item) for item in items]

        def of_lane(lane: int) -> list[Result]:
            return [work(lane, item) for item in items[lane::count]]

        for twin in self.modules[1:]:
            twin.train(self.modules[0].training)
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            futures = []
            for lane, pool in enumerate(self._pools, start=1):
                here = contextvars.copy_context()  # torch.compile's limits, which a new thread would not have
                futures.append(pool.submit(here.run, of_lane, lane))
                if self._is_first_run:
                    wait(futures)
            try:
                parts = [of_lane(0)]
            finally:
                wait(futures)
        finally:
            torch.set_num_threads(before)
        self._is_first_run = False
        parts += [future.result() for future in futures]
        return [parts[index % count][index // count] for index in range(len(items))]

    def take_gradients(self, weights: nn.Parameter) -> list[Tensor]:
        """Those of one of the model's parameters in the lanes that reached it, which then have none."""
        found = []
        for one in self._twins[id(weights)]:
            if one.grad is not None:
                found.append(one.grad)
                one.grad = None
        return found

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add those of the twins to the model's, and clear them."""
        if len(self.modules) == 1:
            return
        for weights in self.modules[0].parameters():
            found = self.take_gradients(weights)
            for gradient in found[1:]:
                found[0] += gradient
            weights.grad = found[0] if found else None


def _twin(model: MiniVLM, is_compiled: bool) -> MiniVLM:
    """A copy with the same memory of weights. Whoever moves them elsewhere must do so before."""
    shared = {id(weights): nn.Parameter(weights.data, weights.requires_grad) for weights in model.parameters()}
    twin = copy.deepcopy(model, shared)  # a copy forgets that layers were compiled
    if is_compiled:
        compile_model(twin, next(model.parameters()).device)
    return twin


RANDOM = ("dropout", "layerdrop", "jitter")
"""Words in the names of stock models' numbers that say how much is drawn at random in training."""


def refuse_randomness(model: nn.Module) -> None:
    """Several lanes would draw in no order that a resume could repeat.

    Raises:
        ValueError: the model drops or changes something at random in training.
    """
    for path, module in model.named_modules():
        numbers = {name: value for name, value in vars(module).items() if any(word in name for word in RANDOM)}
        numbers |= {"p": module.p} if isinstance(module, _DropoutNd) else {}
        for name, number in numbers.items():
            if isinstance(number, float) and number > 0:
                raise ValueError(
                    f"{path}.{name}={number:g} draws at random in training, and micro-batches side by side would draw "
                    "in another order each time: type train.parallel_micro_batches=1"
                )
