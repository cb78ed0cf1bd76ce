"""Scores of predictions against references. Pure functions."""

from collections import Counter
from collections.abc import Sequence


def accuracy(correct: Sequence[bool]) -> float:
    """Share of True.

    Raises:
        ValueError: nothing was scored (0 of 0 is not an accuracy).
    """
    if not correct:
        raise ValueError("accuracy of no answers: run at least one question")
    return sum(correct) / len(correct)


def token_accuracy(predicted: Sequence[int], reference: Sequence[int]) -> float:
    """Share of positions that hold the reference's token, out of the longer of the two.

    Strict: a missing or an additional token shifts and costs everything after it. 1.0 means reproduced exactly.
    """
    longest = max(len(predicted), len(reference))
    if longest == 0:
        return 1.0
    return sum(a == b for a, b in zip(predicted, reference, strict=False)) / longest


def token_f1(predicted: Sequence[int], reference: Sequence[int]) -> float:
    """Harmonic mean of precision and recall over tokens as a bag: order does not matter (SQuAD's F1, on token ids)."""
    if not predicted or not reference:
        return float(not predicted and not reference)
    shared = (Counter(predicted) & Counter(reference)).total()
    return 2 * shared / (len(predicted) + len(reference))
