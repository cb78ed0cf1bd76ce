"""Where a worker keeps float32 weights and moments under each ZeRO stage: DeepSpeed's flat buffers, by parameter.

| ZeRO stage, precision | optimizer | float32 weights of a parameter |
|---|---|---|
| 0 float32 | torch's own | the parameter itself, on every worker |
| 0 bfloat16 | `MasterWeights` | a run in the copy of some parameters, on every worker |
| 1, 2 (1 bfloat16: BF16_Optimizer) | DeepSpeedZeroOptimizer | a run in the worker's flat partition of its group |
| 3 | DeepSpeedZeroOptimizer_Stage3 | an equal run on every worker, the last one padded |

Moments lie beside the weights they belong to, except Muon's momentum under DeepSpeedZeroOptimizer: that holds whole
matrices. Called by `minivlm.train.engine`; seen in the source of DeepSpeed 0.19.8.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.train.shards import MASTER, SavedShards, Shard, save_shards

ADAM_KEYS = ("exp_avg", "exp_avg_sq")
MUON_KEY = "momentum_buffer"

Place = tuple[nn.Parameter, int]
"""What an optimizer updates, and the first element of a parameter in it when flattened."""


@dataclass(frozen=True)
class Held:
    """The run of one parameter whose float32 weights this worker updates."""

    name: str
    group: int
    """Of the optimizer's groups."""

    buffer: Tensor
    """What the optimizer updates; the run is `buffer[offset : offset + length]` when flattened."""

    offset: int
    start: int
    """First element of the run within the flattened parameter."""

    length: int

    def part(self, flat: Tensor) -> Tensor:
        """The run within a tensor laid out as `buffer`."""
        return flat.view(-1).narrow(0, self.offset, self.length)


class ZeroState:
    """The training state behind a DeepSpeed engine, on this worker."""

    def __init__(
        self,
        optimizer: Any,
        learning: dict[str, nn.Parameter],
        sizes: dict[str, int],
        *,
        places: dict[str, Place],
        zero_stage: int,
        precision: str,
        rank: int,
        world_size: int,
    ) -> None:
        """Take a new engine's optimizer.

        Args:
            learning: parameters that learn, by name.
            sizes: their elements; ZeRO-3 leaves the parameters themselves empty.
            places: at stage 0 of each of them; else unused.
        """
        self._optimizer, self._learning, self._sizes, self._zero_stage = optimizer, learning, sizes, zero_stage
        self._rank, self._world_size = rank, world_size
        self._base: torch.optim.Optimizer = optimizer.optimizer if zero_stage else optimizer
        self._has_whole_momenta = zero_stage == 2 or (zero_stage == 1 and precision == "float32")
        self._names, self._places = {id(parameter): name for name, parameter in learning.items()}, places
        self._held = list(self._find())

    def save(self, directory: Path) -> None:
        """Write this worker's file; of what all workers hold alike (stage 0), its share. Needs one update before."""
        is_mine = [self._zero_stage > 0 or i % self._world_size == self._rank for i in range(len(self._held))]
        held = [held for held, mine in zip(self._held, is_mine, strict=True) if mine]
        save_shards(directory, self._rank, self._shards(held))

    def load(self, directory: Path, *, updates: int) -> None:
        """Continue after `updates` optimizer steps from what any number of workers saved under any ZeRO stage.

        Raises:
            CheckpointError: no state there, or that of other parameters.
        """
        saved = SavedShards(directory)
        saved.check(self._sizes)
        self._allocate(updates)
        for shard in self._shards(self._held):
            saved.fill(shard)
        if self._zero_stage == 3:
            self._refresh_stage_3()
            return
        for name, whole in self._learning.items():
            whole.data.copy_(saved.read(name, MASTER, 0, self._sizes[name]).view_as(whole))

    def _shards(self, chosen: Iterable[Held]) -> Iterator[Shard]:
        for held in chosen:
            yield Shard(held.name, MASTER, held.start, held.part(held.buffer.detach()))
            for key in self._keys(held.group):
                if key == MUON_KEY and self._has_whole_momenta:
                    continue
                yield Shard(held.name, key, held.start, held.part(self._base.state[held.buffer][key]))
        if self._has_whole_momenta:
            yield from self._whole_momenta()

    def _allocate(self, updates: int) -> None:
        """Make the moments that the optimizer would make in its first step, as after `updates` of them."""
        for held in {id(held.buffer): held for held in self._held}.values():
            state = self._base.state[held.buffer]
            if self._uses_muon(held.group):
                state[MUON_KEY] = self._new_momentum(held)
                continue
            for key in ADAM_KEYS:
                state[key] = torch.zeros_like(held.buffer)
            state["step"] = torch.tensor(float(updates), device=held.buffer.device)

    def _refresh_stage_3(self) -> None:
        """Give forward the new weights: each worker its partition, then the small ones that stay whole."""
        whole = self._optimizer.persistent_parameters
        if whole:
            whole[0].partition(whole)
        for held in self._held:
            parameter: Any = self._learning[held.name]
            parameter.ds_tensor.data.view(-1)[: held.length].copy_(held.part(held.buffer.detach()))
        if whole:
            whole[0].all_gather(whole)

    def _find(self) -> Iterator[Held]:
        base = self._base
        if self._zero_stage == 0:
            groups = {id(buffer): i for i, group in enumerate(base.param_groups) for buffer in group["params"]}
            for name, (buffer, offset) in self._places.items():
                yield Held(name, groups[id(buffer)], buffer, offset, 0, self._sizes[name])
        elif self._zero_stage == 3:
            yield from self._find_stage_3()
        else:
            for name, learning in self._learning.items():
                parameter: Any = learning
                mapping = parameter._hp_mapping
                if mapping is not None:
                    (buffer,) = base.param_groups[mapping.param_group_index]["params"]
                    place, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
                    yield Held(name, mapping.param_group_index, buffer, place.start, start, place.numel)

    def _find_stage_3(self) -> Iterator[Held]:
        optimizer = self._optimizer
        for name, learning in self._learning.items():
            parameter: Any = learning
            sub_group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = min(padded * self._rank, parameter.ds_numel)
            length = min(padded, parameter.ds_numel - start)
            group = optimizer.sub_group_to_group_id[sub_group]
            yield Held(name, group, optimizer.fp32_partitioned_groups_flat[sub_group], offset, start, length)

    def _whole_momenta(self) -> Iterator[Shard]:
        for number, group in enumerate(self._base.param_groups):
            position, matrices = 0, self._optimizer.params_in_partition[number]
            if not self._uses_muon(number) or not matrices:
                continue
            momenta = self._base.state[group["params"][0]][MUON_KEY]
            for matrix in matrices:
                yield Shard(self._names[id(matrix)], MUON_KEY, 0, momenta.narrow(0, position, matrix.numel()))
                position += matrix.numel()

    def _new_momentum(self, held: Held) -> Tensor:
        if self._has_whole_momenta:
            count = sum(matrix.numel() for matrix in self._optimizer.params_in_partition[held.group])
            return torch.zeros(count, device=held.buffer.device)
        if self._zero_stage == 3:
            return torch.zeros_like(held.buffer, dtype=self._optimizer.communication_data_type)
        return torch.zeros_like(held.buffer)

    def _uses_muon(self, group: int) -> bool:
        return bool(self._base.param_groups[group].get("use_muon"))

    def _keys(self, group: int) -> tuple[str, ...]:
        return (MUON_KEY,) if self._uses_muon(group) else ADAM_KEYS
