"""Layout of one optimizer step: units -> rows of about equal length -> micro-batches of about equal cost.

Several packings are tried and the cheapest is kept. Cost is what the slowest rank computes: padded tokens, padding
included, a little more per token in long rows because of attention.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Mapping
from itertools import pairwise

LENGTH_MULTIPLE = 8
"""A micro-batch is padded to its longest row, rounded up to a multiple of this."""

_ATTENTION_TOKENS = 4096
"""Row length at which attention costs about as much as the matrices; shorter rows are preferred a little."""

_MAX_TRIALS = 16
"""Packings of each of two kinds tried per step."""

_HALVINGS = 20
"""Halvings of the interval in which the cost of the costliest micro-batch is sought."""

Rows = list[list[int]]


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple that is not below value."""
    return -(-value // multiple) * multiple


def lay_out(tokens: Mapping[int, int], world_size: int, budget: int, pack_length: int) -> list[Rows]:
    """Micro-batches of one step, their number padded with empty ones to a multiple of `world_size`.

    Args:
        tokens: length of each unit. A unit is never cut and never shares a token with its neighbours.
        budget: most tokens of a micro-batch, padding included; a unit longer than that gets its own.
        pack_length: longest row made by packing, or twice the longest unit where that is more.
    """
    alone = [unit for unit in sorted(tokens, key=lambda unit: -tokens[unit]) if _width(tokens[unit]) > budget]
    rest = {unit: length for unit, length in tokens.items() if _width(length) <= budget}
    packed: list[Rows] = []
    count = world_size * -(-sum(rest.values()) // (world_size * budget))
    while rest and not packed:
        packed = _best_layout(rest, min(count, len(rest)), world_size, budget, pack_length)
        count += world_size
    micro_batches = [[[unit]] for unit in alone] + packed
    return micro_batches + [[] for _ in range(-len(micro_batches) % world_size)]


def _best_layout(tokens: Mapping[int, int], count: int, world_size: int, budget: int, pack_length: int) -> list[Rows]:
    """The cheapest tried layout of `count` micro-batches; empty if none fits the budget."""
    total, longest = sum(tokens.values()), max(tokens.values())
    limit = max(pack_length, 2 * longest)
    spread = [
        (_estimate(num_rows, -(-total // num_rows), world_size), num_rows, True)
        for num_rows in range(max(count, -(-total // limit)), len(tokens) + 1)
    ]
    fill = [
        (_estimate(-(-total // width), width, world_size), width, False)
        for width in range(_width(longest), limit + 1, LENGTH_MULTIPLE)
    ]
    last = (0.0, len(tokens), True)  # one unit per row: fits if anything does
    best_cost, best = float("inf"), []
    for estimate, size, is_spread in [*sorted(spread)[:_MAX_TRIALS], *sorted(fill)[:_MAX_TRIALS], last]:
        if estimate >= best_cost:
            continue
        rows = _spread(tokens, size) if is_spread else _fill(tokens, size)
        if len(rows) < count:
            continue
        micro_batches = _deal(tokens, rows, count)
        shapes = [(len(part), _width(_length(tokens, part[0]))) for part in micro_batches]
        costs = [_cost(*shape) for shape in shapes]
        cost = world_size * sum(max(costs[start : start + world_size]) for start in range(0, count, world_size))
        if cost < best_cost and all(height * width <= budget for height, width in shapes):
            best_cost, best = cost, micro_batches
    return best


def _spread(tokens: Mapping[int, int], num_rows: int) -> Rows:
    """Longest first, each to the emptiest of `num_rows` rows, so that rows end about equal."""
    rows: Rows = [[] for _ in range(num_rows)]
    heap = [(0, index) for index in range(num_rows)]
    for unit in _longest_first(tokens):
        filled, index = heap[0]
        rows[index].append(unit)
        heapq.heapreplace(heap, (filled + tokens[unit], index))
    return rows


def _fill(tokens: Mapping[int, int], width: int) -> Rows:
    """Longest first, each to the fullest row of `width` tokens where it still fits (best fit decreasing)."""
    rows: Rows = []
    space: list[tuple[int, int]] = []
    for unit in _longest_first(tokens):
        place = bisect_left(space, (tokens[unit], -1))
        if place < len(space):
            left, index = space.pop(place)
        else:
            left, index = width, len(rows)
            rows.append([])
        rows[index].append(unit)
        insort(space, (left - tokens[unit], index))
    return rows


def _deal(tokens: Mapping[int, int], rows: Rows, count: int) -> list[Rows]:
    """Cut the rows, longest first, into `count` micro-batches so that the costliest is as cheap as possible."""
    ordered = sorted(rows, key=lambda row: (-_length(tokens, row), row))
    per_row = [_cost(1, _width(_length(tokens, row))) for row in ordered]
    low, high = sum(per_row) / count, per_row[0] * len(rows)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _cut(per_row, count, middle)[-1] == len(rows):
            high = middle
        else:
            low = middle
    cuts = _cut(per_row, count, high)
    return [ordered[start:end] for start, end in pairwise(cuts)]


def _cut(per_row: list[float], count: int, limit: float) -> list[int]:
    """Bounds of `count` non-empty runs of rows, each as high as its first row's cost allows under `limit`."""
    cuts = [0]
    for part in range(count):
        start = cuts[-1]
        height = max(1, int(limit / per_row[start]))
        cuts.append(min(start + height, len(per_row) - (count - 1 - part)))
    return cuts


def _longest_first(tokens: Mapping[int, int]) -> list[int]:
    return sorted(tokens, key=lambda unit: (-tokens[unit], unit))


def _length(tokens: Mapping[int, int], row: list[int]) -> int:
    return sum(tokens[unit] for unit in row)


def _width(length: int) -> int:
    return round_up(length, LENGTH_MULTIPLE)


def _estimate(num_rows: int, length: int, world_size: int) -> float:
    return _cost(round_up(num_rows, world_size), _width(length))


def _cost(height: int, width: int) -> float:
    return height * width * (1 + width / _ATTENTION_TOKENS)
