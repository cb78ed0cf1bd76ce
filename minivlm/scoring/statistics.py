"""Means with 95 % intervals for questions that share pictures, and differences of two checkpoints. Pure functions.

Questions about one picture fail together, so the plain standard error is too small: errors are summed within each
picture before they are squared (Miller 2024, arXiv:2411.00640, Sec. 2.2). Two checkpoints answer the same questions, so
they are compared question by question: what is hard for both drops out of the difference (Sec. 4.2 there).
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054
Z80 = 0.8416212335729143
"""Quantile of the normal distribution at 0.80, the power asked of `smallest_difference`."""

_LEVEL = 0.05


@dataclass(frozen=True)
class PairedDifference:
    """Mean score of one checkpoint minus that of the baseline on the same questions.

    `error` is the clustered standard error of the difference; interval (95 %) and p-value (two-sided, against no
    difference) are those of Student's t with num_clusters - 1 degrees of freedom. With a single cluster nothing can be
    said, and `error` and all that follows from it are None. `minimum_difference`: see `smallest_difference`.
    """

    difference: float
    n: int
    num_clusters: int
    error: float | None
    low: float | None
    high: float | None
    p_value: float | None
    minimum_difference: float | None


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
    error = standard_error(values, clusters)
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


def standard_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Clustered standard error of the mean of `values`; 0 for a single cluster, where nothing can be said."""
    mean = sum(values) / len(values)
    return clustered_error([value - mean for value in values], [1 / len(values)] * len(values), clusters)


def smallest_difference(error: float) -> float | None:
    """Smallest true difference that is found with 80 % power by a two-sided test at the 5 % level.

    (z_0.975 + z_0.80) * error = 2.80 * error

    Args:
        error: standard error of the *difference*. Of one run alone it is not known; sqrt(2) times the run's own error
            holds for a second run with independent mistakes, and is more than two runs on the same questions have.

    Returns:
        The difference; None where the error is 0: scores that are all equal tell nothing of their spread.

    Source: Miller 2024, arXiv:2411.00640, Sec. 5.
    """
    return (Z95 + Z80) * error if error > 0 else None


def paired_difference(
    scores: Sequence[float], baseline: Sequence[float], clusters: Sequence[Hashable]
) -> PairedDifference:
    """Compare two checkpoints on the same questions.

    Args:
        scores, baseline: [n] scores of the two, question by question.
        clusters: [n] what each question depends on (the picture's digest).

    Raises:
        ValueError: nothing to compare, or lengths differ.
    """
    return paired_macro_difference({"": scores}, {"": baseline}, {"": clusters})


def paired_macro_difference(
    scores: Mapping[str, Sequence[float]],
    baseline: Mapping[str, Sequence[float]],
    clusters: Mapping[str, Sequence[Hashable]],
) -> PairedDifference:
    """`paired_difference` of the unweighted mean over tasks; a picture that several tasks show is one cluster.

    Args:
        scores, baseline, clusters: as there, by task; the same tasks in all three.

    Raises:
        ValueError: no task, a task without scores, or lengths differ.
    """
    sizes = {task: len(values) for task, values in scores.items()}
    others = ({task: len(values) for task, values in given.items()} for given in (baseline, clusters))
    if not sizes or not all(sizes.values()) or any(other != sizes for other in others):
        raise ValueError("a paired comparison needs the same questions of both checkpoints, and at least one")
    mean = 0.0
    deviations: list[float] = []
    weights: list[float] = []
    groups: list[Hashable] = []
    for task, values in scores.items():
        differences = [ours - theirs for ours, theirs in zip(values, baseline[task], strict=True)]
        centre = sum(differences) / len(differences)
        mean += centre / len(scores)
        deviations += [difference - centre for difference in differences]
        weights += [1 / (len(scores) * len(differences))] * len(differences)
        groups += clusters[task]
    count = len(set(groups))
    if count < 2:
        return PairedDifference(mean, len(groups), count, None, None, None, None, None)
    error = clustered_error(deviations, weights, groups)
    half = t_quantile(1 - _LEVEL / 2, count - 1) * error
    p_value = t_p_value(mean / error, count - 1) if error > 0 else float(mean == 0)
    smallest = smallest_difference(error)
    return PairedDifference(mean, len(groups), count, error, mean - half, mean + half, p_value, smallest)


def t_p_value(t: float, degrees: int) -> float:
    """Probability that Student's t is at least as far from 0 as `t`. Source: DLMF 8.17, NIST."""
    return _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def t_quantile(probability: float, degrees: int) -> float:
    """The t >= 0 below which Student's t lies with this probability (0.5 to 1), to 1e-12 relative, by bisection."""
    tail = 2 * (1 - probability)
    low, high = 0.0, 1.0
    while t_p_value(high, degrees) > tail:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_p_value(middle, degrees) > tail else (low, middle)
    return high


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


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22, Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side only
        return 1 - _incomplete_beta(b, a, 1 - x)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    value, c, d = 2.0, 2.0, 1.0  # after the first step, of 1 + 1 / (1 + term / (1 + ...))
    for step in range(1, 10_000):
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / (1 + term * d)
        c = 1 + term / c
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(scale) / a * (value - 1)
