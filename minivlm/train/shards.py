"""Training state on disk, independent of how many workers wrote it: runs of flattened parameters, in safetensors.

    engine/rank=00000.safetensors   tensors `NAME/KEY/START`, one file per worker
                                    NAME: parameter   KEY: master, exp_avg, exp_avg_sq or momentum_buffer
                                    START: element of the flattened parameter at which the run begins

A worker writes what it holds, without talking to others, and reads what it is to hold under any other number of
workers or ZeRO stage. Bits are copied, nothing is computed, and nothing is unpickled.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minivlm.model.checkpoint import CheckpointError
from minivlm.model.loading import compare_shapes

MASTER = "master"
"""The float32 weights that the optimizer updates."""


@dataclass(frozen=True)
class Shard:
    """A run of one state of one flattened parameter, as a worker holds it."""

    name: str
    """Of the parameter."""

    key: str
    start: int
    """Element of the flattened parameter that `values` begins with."""

    values: Tensor
    """[n], a view of the training state: writing to it changes that."""


def save_shards(directory: Path, rank: int, shards: Iterable[Shard]) -> None:
    """Write this worker's file."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{shard.name}/{shard.key}/{shard.start}": shard.values.detach().cpu().clone()
        for shard in shards
        if shard.values.numel()
    }
    save_file(tensors, directory / f"rank={rank:05d}.safetensors")


class SavedShards:
    """Read side of `save_shards`, over the files of all workers that wrote."""

    def __init__(self, directory: Path) -> None:
        """Read the files' headers.

        Raises:
            CheckpointError: no such files, or one that is none of ours.
        """
        self._directory = directory
        self._places: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        paths = sorted(directory.glob("rank=*.safetensors"))
        if not paths:
            raise CheckpointError(
                f"No training state of this version under {directory}. "
                f"Delete {directory.parent.parent} and run it again"
            )
        for path in paths:
            try:
                file = safe_open(path, "pt")
                for label in file.keys():  # noqa: SIM118 (not a dict)
                    name, key, start = label.rsplit("/", 2)
                    (length,) = file.get_slice(label).get_shape()
                    self._places.setdefault((name, key), []).append((int(start), length, file, label))
            except (OSError, ValueError, SafetensorError) as error:
                raise CheckpointError(f"{path} holds no training state ({error}). Delete {directory.parent}") from error
        for places in self._places.values():
            places.sort(key=lambda place: place[:2])

    def check(self, sizes: Mapping[str, int]) -> None:
        """Every learning parameter must be saved, nothing else, and all states whole: on every worker, or on none.

        Args:
            sizes: elements of each learning parameter by name.

        Raises:
            CheckpointError: the message counts matched, missing, unexpected and mis-sized parameters, or names a state
                that was not saved whole.
        """
        saved = {name: self._size(name) for name, key in self._places if key == MASTER}
        report = compare_shapes(saved, sizes)
        if report is not None:
            raise CheckpointError(
                f"{self._directory} is the state of another model: {report}. Delete {self._directory.parent}"
            )
        for name, key in self._places:
            self._check_whole(name, key, sizes.get(name, 0))

    def read(self, name: str, key: str, start: int, length: int) -> Tensor:
        """Elements start..start+length-1 of a state, [length], on the CPU.

        Raises:
            CheckpointError: they were not all saved.
        """
        parts, position = [], start
        for first, count, file, label in self._places.get((name, key), []):
            if first <= position < min(first + count, start + length):
                end = min(first + count, start + length)
                parts.append(file.get_slice(label)[position - first : end - first])
                position = end
        if position < start + length:
            raise CheckpointError(
                f"{self._directory} lacks {key} of {name} from element {position} on. Delete {self._directory.parent}"
            )
        return torch.cat(parts) if parts else torch.empty(0)

    def fill(self, shard: Shard) -> None:
        """Overwrite a shard's values with what was saved."""
        shard.values.copy_(self.read(shard.name, shard.key, shard.start, shard.values.numel()))

    def _check_whole(self, name: str, key: str, size: int) -> None:
        end = 0
        for start, length, *_ in self._places[name, key]:
            end = max(end, start + length) if start <= end else end
        if end != size:
            raise CheckpointError(
                f"{self._directory} holds elements 0 to {end} of {size} of {key} of {name}. "
                f"Delete {self._directory.parent}"
            )

    def _size(self, name: str) -> int:
        return max(start + length for start, length, *_ in self._places[name, MASTER])
