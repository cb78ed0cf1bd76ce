"""The order of training as a pure function of (lengths, seed, epoch).

An epoch is a shuffle of the units, cut into optimizer steps of `global_batch_size`. Inside a step, units are packed
into rows of about equal length (next to no padding), rows dealt to as few micro-batches as fit `micro_batch_tokens`,
of about equal cost (ranks wait little). Steps depend on seed and epoch alone; only their layout on the world size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minivlm.data.packing import LENGTH_MULTIPLE, lay_out, round_up

Row = tuple[int, ...]
MicroBatch = tuple[Row, ...]


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step.

    `units` are in training order. `micro_batches[j]` runs on rank j % world_size; each is a tuple of rows, each row the
    table entries packed into it; an empty tuple is a zero-weight micro-batch. The members of a unit stand side by side.
    """

    units: tuple[int, ...]
    micro_batches: tuple[MicroBatch, ...]


def plan_epoch(
    lengths: Sequence[int] | np.ndarray,
    *,
    group_size: int = 1,
    seed: int,
    epoch: int,
    global_batch_size: int,
    world_size: int,
    micro_batch_tokens: int,
    pack_length: int,
) -> list[PlannedStep]:
    """Plan one epoch; to resume after k steps, take `plan[k:]`.

    Args:
        lengths: [E] tokens per table entry; unit i = entries group_size*i .. group_size*i + group_size-1.
        global_batch_size: units per step over all ranks; the last step of the epoch keeps what is left.
        micro_batch_tokens: most tokens of one micro-batch, padding included. A longer unit is alone in its own.
        pack_length: longest row made by packing, in tokens; where samples are long, twice the longest unit.

    Raises:
        ValueError: no entries, a length below 1, entries that do not form groups, or a setting below 1.
    """
    sizes = np.asarray(lengths, np.int64)
    settings = {"group_size": group_size, "global_batch_size": global_batch_size, "world_size": world_size}
    settings |= {"micro_batch_tokens": micro_batch_tokens, "pack_length": pack_length}
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    if not len(sizes) or sizes.min() < 1:
        raise ValueError("nothing to plan: the token table is empty or has an empty entry")
    if len(sizes) % group_size:
        raise ValueError(f"{len(sizes)} entries do not form groups of {group_size}")
    unit_lengths = sizes.reshape(-1, group_size).sum(axis=1)
    order = np.random.default_rng([seed, epoch]).permutation(len(unit_lengths))
    steps = []
    for start in range(0, len(order), global_batch_size):
        units = [int(unit) for unit in order[start : start + global_batch_size]]
        unit_tokens = {unit: int(unit_lengths[unit]) for unit in units}
        layout = lay_out(unit_tokens, world_size, micro_batch_tokens, pack_length)
        micro_batches = tuple(tuple(_entries(row, group_size) for row in rows) for rows in layout)
        steps.append(PlannedStep(tuple(units), micro_batches))
    return steps


def padded_length(rows: Sequence[Row], lengths: Sequence[int] | np.ndarray) -> int:
    """Width of a collated micro-batch: its longest row rounded up, at least one multiple."""
    longest = max((sum(int(lengths[entry]) for entry in row) for row in rows), default=1)
    return round_up(longest, LENGTH_MULTIPLE)


def _entries(row: Sequence[int], group_size: int) -> Row:
    return tuple(unit * group_size + member for unit in row for member in range(group_size))
