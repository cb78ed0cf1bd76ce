"""DeepSpeed behind a small interface: forward, backward, update, save, load, gather. The only module that imports it.

We own the accumulation boundary: a step has as many micro-batches as its plan says, `accumulate` takes those of a rank.
Losses come in already divided by the step's global counts; DeepSpeed averages gradients over ranks, so they are
multiplied by the world size here, and the gradient is that of the sum over all micro-batches of all ranks.
"""

import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minivlm.model.vlm import MiniVLM, TokenLogps, cast_weights
from minivlm.train.lanes import Lanes
from minivlm.train.masters import CompiledAdamW, MasterWeights, clip_gradients
from minivlm.train.optimizer import Groups, OptimizerSettings, learning_rate_at, parameter_groups
from minivlm.train.stages import Batch, StageLoss
from minivlm.train.zero import Place, ZeroState

_hidden = sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]  # its autotuner would import it: 2 s a worker
import deepspeed  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402

if _hidden is None:
    del sys.modules["mlflow"]

BUCKET_ELEMENTS = 50_000_000

Forward = Callable[[Batch], TokenLogps]


@dataclass(frozen=True)
class StepReport:
    """What one update did."""

    learning_rate: float
    grad_norm: float
    """Over all parameters and ranks, before clipping; with ZeRO, Muon's matrices count with their update."""


class Engine:
    """One rank's share of the training state. Every method is collective: all ranks call it at the same time.

    Needs an initialised torch.distributed group (Ray Train makes it). The model is float32 when handed over; with
    precision "bfloat16" it computes in bfloat16 and keeps float32 master weights.
    """

    def __init__(
        self,
        model: MiniVLM,
        *,
        zero_stage: int,
        precision: str,
        optimizer: OptimizerSettings,
        total_steps: int,
        device: torch.device,
        offload: str = "none",
        num_lanes: int = 1,
        is_compiled: bool = False,
    ) -> None:
        """
        Args:
            offload: none, optimizer or optimizer_and_parameters: what ZeRO holds in host memory.
            num_lanes: micro-batches side by side; more than one on a CPU and at stage 0 only.
            is_compiled: the model's layers are.
        """
        _quiet_start(device)
        self._settings, self._total_steps = optimizer, total_steps
        self._is_sharded = zero_stage > 0
        self.world_size = dist.get_world_size()
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        uses_muon = optimizer.muon_learning_rate > 0
        self._clip_norm = math.inf if uses_muon else optimizer.clip_norm
        clip_norm = optimizer.clip_norm if self._is_sharded and not uses_muon else 0.0
        config = deepspeed_config(zero_stage, precision, clip_norm=clip_norm, uses_muon=uses_muon, offload=offload)
        model = model.to(device)
        learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        sizes = {name: parameter.numel() for name, parameter in learning.items()}
        self._learning = list(learning.values())
        groups = parameter_groups(learning.items(), optimizer)
        if not self._is_sharded:
            for weights in learning.values():  # DeepSpeed does so too, but after the optimizer has its copies
                dist.broadcast(weights.data, 0)
        self._places: dict[str, Place] = {name: (weights, 0) for name, weights in learning.items()}
        """At ZeRO-0 what the optimizer updates and where in it a parameter starts: itself, or its float32 copy."""
        if precision == "bfloat16" and not self._is_sharded:
            kind = CompiledAdamW if is_compiled and device.type == "cpu" and not uses_muon else MasterWeights
            masters = kind(groups, partial(make_optimizer, settings=optimizer))
            self._places = {self._names[id(weights)]: place for weights, place in masters.places()}
            cast_weights(model, torch.bfloat16)
            updater: torch.optim.Optimizer = masters
        else:
            updater = make_optimizer(groups, optimizer)
        self._lanes = Lanes(model, num_lanes, is_compiled=is_compiled)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=updater, config=config)
        if not self._is_sharded:
            self._engine.enable_backward_allreduce = False  # `accumulate` does so, once and for several workers only
        self._peaks = [group["lr"] for group in self._engine.optimizer.param_groups]
        self.module: nn.Module = self._engine.module
        self._state = ZeroState(
            self._engine.optimizer,
            learning,
            sizes,
            places=self._places,
            zero_stage=zero_stage,
            precision=precision,
            rank=dist.get_rank(),
            world_size=self.world_size,
        )

    def forward(self, batch: dict[str, Tensor]) -> Any:
        """The model's output; gradients flow."""
        return self._engine(batch)

    def accumulate(
        self, loss_of: Callable[[Forward, Batch], StageLoss], batches: Sequence[Batch]
    ) -> list[dict[str, Tensor]]:
        """Add up the gradients of this rank's micro-batches of a step.

        Args:
            loss_of: a forward and a micro-batch -> its share of the step's loss; called in several threads.

        Returns:
            Metrics of each micro-batch.
        """
        num_lanes = len(self._lanes.modules)

        def differentiate(lane: int, index: int) -> dict[str, Tensor]:
            result = loss_of(self._lanes.modules[lane] if lane else self._engine, batches[index])
            loss = result.loss * self.world_size
            if lane:
                loss.backward()
            else:
                self._engine.set_gradient_accumulation_boundary(index + num_lanes >= len(batches))
                self._engine.backward(loss)
            return result.metrics

        metrics = self._lanes.run(differentiate, range(len(batches)))
        if self.world_size > 1 or not isinstance(self._engine.optimizer, MasterWeights):
            self._lanes.add_gradients()  # else where they are taken
        if not self._is_sharded and self.world_size > 1:
            self._engine.allreduce_gradients()
        return metrics

    def update(self, step: int) -> StepReport:
        """Clip and apply the gradients of optimizer step `step` (0-based), then clear them."""
        rate = learning_rate_at(step, self._total_steps, self._settings)
        for group, peak in zip(self._engine.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = rate * (peak / self._settings.learning_rate)
        if self._is_sharded:
            self._engine.step()
            return StepReport(rate, float(self._engine.get_global_grad_norm()))
        if isinstance(self._engine.optimizer, MasterWeights):
            norm = self._engine.optimizer.clip(self._clip_norm, self._lanes.take_gradients)
        else:
            norm = clip_gradients(self._learning, self._clip_norm)
        self._engine.step()
        return StepReport(rate, norm)

    def save(self, directory: Path) -> None:
        """Write every rank's share of the weights and moments under `directory` (shared by all ranks)."""
        self._state.save(directory)

    def load(self, directory: Path, *, updates: int) -> None:
        """Continue from `save` after `updates` steps, with any number of ranks and any ZeRO stage then and now.

        Float32 weights and moments are bit-equal to those saved.

        Raises:
            CheckpointError: no state there, or that of another model.
        """
        self._state.load(directory, updates=updates)

    def gather_state_dict(self, *, learning_only: bool = False) -> dict[str, Tensor] | None:
        """Full float32 weights by parameter name, on rank 0 (None elsewhere); tied weights appear once.

        With `learning_only` without the frozen ones. With bfloat16, frozen parts give the rounded weights that training
        computed with.
        """
        weights: dict[str, Tensor] = {}
        is_first = dist.get_rank() == 0
        for parameter in self._engine.module.parameters():
            if learning_only and not parameter.requires_grad:
                continue
            name = self._names[id(parameter)]
            if not parameter.requires_grad:
                full = None
            elif self._is_sharded:
                full = safe_get_full_fp32_param(parameter)
            else:
                master, start = self._places[name]
                full = master.view(-1)[start : start + parameter.numel()].view_as(parameter)
            if full is None:
                with deepspeed.zero.GatheredParameters([parameter]):
                    full = parameter.data.float()
            if is_first:
                weights[name] = full.detach().cpu().clone()
        return weights if is_first else None


def make_optimizer(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW, or DeepSpeed's Muon with AdamW beside it (ZeRO orthogonalises whole matrices before it shards them)."""
    if not settings.muon_learning_rate:
        return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.beta2), fused=True)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # compiles functions when imported

    for group in groups:
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW)
    return optimizer


def deepspeed_config(
    zero_stage: int, precision: str, *, clip_norm: float, uses_muon: bool, offload: str
) -> dict[str, Any]:
    """DeepSpeed settings: sums stay float32 where ZeRO allows it, no timers, no prints."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only counts samples for logs: micro-batches are ours
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": False,
            "reduce_scatter": not uses_muon,  # Muon needs whole gradients
            "contiguous_gradients": True,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        },
    }
    if offload != "none":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW runs there too, and needs no compiler
    if offload == "optimizer_and_parameters":
        config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    if precision == "bfloat16" and zero_stage:  # at stage 0 the master weights are ours
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _quiet_start(device: torch.device) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # else it compiles a shared-memory op with g++ that gloo never uses
        deepspeed.runtime.compiler.compile = _run_eagerly  # else Muon's few products are compiled, with g++ too


def _run_eagerly() -> Callable[[Any], Any]:
    """In the place of `torch.compile`, which imports inductor even where it is off: 5 s in every worker."""
    return lambda function: function
