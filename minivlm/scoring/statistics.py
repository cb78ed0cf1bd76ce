"""Means with 95 % intervals for questions that share pictures. Pure functions.

Questions about one picture fail together, so the plain standard error is too small: errors are summed within each
picture before they are squared (Miller 2024, arXiv:2411.00640, Sec. 2.2).
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

Z95 = 1.959963984540054


def mean_interval(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float, float]:
    """Mean of scores in [0, 1] and its 95 % interval, clustered.

    Wilson's interval with the effective number of answers n_eff = p (1 - p) / se^2, at most n; where all scores are
    equal (se = 0) n_eff is the number of clusters. Unlike mean +- 2 se it does not claim certainty at 0 % and 100 %.

    Args:
        values: [n] scores.
        clusters: [n] what each score depends on (the picture's digest).

    Returns:
        (mean, low, high).

    Raises:
        ValueError: no values, lengths differ, or a value outside [0, 1].
    """
    if not values or len(values) != len(clusters):
        raise ValueError(f"need as many clusters as values and at least one, got {len(values)} and {len(clusters)}")
    if min(values) < 0 or max(values) > 1:
        raise ValueError(f"scores must lie in [0, 1], got {min(values)} to {max(values)}")
    n = len(values)
    mean = sum(values) / n
    error = clustered_error([value - mean for value in values], [1 / n] * n, clusters)
    size = float(len(set(clusters)))
    if error > 0:
        size = min(mean * (1 - mean) / error**2, float(n))
    return mean, *_wilson(mean, size)


def macro_interval(
    values: Mapping[str, Sequence[float]], clusters: Mapping[str, Sequence[Hashable]]
) -> tuple[float, float, float]:
    """Unweighted mean over tasks of the mean within each, with its 95 % interval (normal, clipped to [0, 1]).

    Pictures may appear in several tasks: their errors are summed over all of them.

    Raises:
        ValueError: no task, or a task without scores.
    """
    if not values or not all(values.values()):
        raise ValueError("macro mean needs at least one score in every task")
    means = {task: sum(scores) / len(scores) for task, scores in values.items()}
    deviations: list[float] = []
    weights: list[float] = []
    groups: list[Hashable] = []
    for task, scores in values.items():
        deviations += [score - means[task] for score in scores]
        weights += [1 / (len(values) * len(scores))] * len(scores)
        groups += clusters[task]
    mean = sum(means.values()) / len(means)
    error = clustered_error(deviations, weights, groups)
    return mean, max(0.0, mean - Z95 * error), min(1.0, mean + Z95 * error)


def clustered_error(deviations: Sequence[float], weights: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of a weighted mean: sqrt(G / (G - 1) * sum over clusters of (sum of weight * deviation)^2).

    0 for a single cluster, where nothing can be said.
    """
    sums: defaultdict[Hashable, float] = defaultdict(float)
    for deviation, weight, cluster in zip(deviations, weights, clusters, strict=True):
        sums[cluster] += deviation * weight
    if len(sums) < 2:
        return 0.0
    return math.sqrt(len(sums) / (len(sums) - 1) * sum(total**2 for total in sums.values()))


def _wilson(mean: float, size: float) -> tuple[float, float]:
    square = Z95**2
    centre = (mean + square / (2 * size)) / (1 + square / size)
    half = Z95 / (1 + square / size) * math.sqrt(mean * (1 - mean) / size + square / (4 * size**2))
    return max(0.0, centre - half), min(1.0, centre + half)
