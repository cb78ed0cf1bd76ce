"""Comparisons of two checkpoints against hand values, scipy, and what must hold for any scores."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from minivlm.scoring.statistics import (
    Z80,
    paired_difference,
    paired_macro_difference,
    smallest_difference,
    standard_error,
    t_p_value,
    t_quantile,
)

SCORES = st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 1.0])] * 2, st.integers(0, 5)), min_size=2, max_size=30)


def test_paired_difference_hand_value() -> None:
    # Differences 1, 1, 0, -1 about pictures a, a, b, c: mean .25. Deviations .75, .75, -.25, -1.25, each times 1/4,
    # sum within pictures to .375, -.0625, -.3125; 3/2 * (.140625 + .00390625 + .09765625) = .36328125 = .602728^2.
    paired = paired_difference([1, 1, 1, 0], [0, 0, 1, 1], ["a", "a", "b", "c"])
    assert (paired.difference, paired.n, paired.num_clusters) == (0.25, 4, 3)
    assert paired.error == pytest.approx(math.sqrt(0.36328125))
    # Student's t with 2 degrees of freedom: 97.5 % lie below 4.302653; p = 1 - t / sqrt(2 + t^2) at t = .414781.
    assert paired.high == pytest.approx(0.25 + 4.302653 * 0.602728, abs=1e-5)
    assert paired.p_value == pytest.approx(1 - 0.414781 / math.sqrt(2 + 0.414781**2), abs=1e-6)
    assert paired.minimum_difference == pytest.approx((1.959964 + 0.841621) * 0.602728, abs=1e-5)


def test_one_question_per_picture_is_the_paired_t_test() -> None:
    ours, theirs = [0.9, 0.4, 1.0, 0.3, 0.7, 0.2], [0.5, 0.5, 0.6, 0.1, 0.9, 0.0]
    paired = paired_difference(ours, theirs, range(6))
    expected = stats.ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.95)
    assert paired.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert (paired.low, paired.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


@pytest.mark.parametrize("degrees", [1, 2, 5, 30, 999, 100_000])
@pytest.mark.parametrize("t", [0.0, 0.1, 1.0, 2.5, 7.0])
def test_students_t_is_scipys(t: float, degrees: int) -> None:
    assert t_p_value(t, degrees) == pytest.approx(2 * stats.t.sf(t, degrees), rel=1e-8)
    assert t_quantile(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-8)


@given(SCORES)
def test_swapping_the_checkpoints_turns_the_sign(rows: list[tuple[float, float, int]]) -> None:
    ours, theirs, clusters = zip(*rows, strict=True)
    there, back = paired_difference(ours, theirs, clusters), paired_difference(theirs, ours, clusters)
    assert there.difference == pytest.approx(-back.difference)
    assert there.error == pytest.approx(back.error)
    assert there.p_value == pytest.approx(back.p_value)


@given(SCORES, st.floats(-1, 1))
def test_what_both_find_equally_hard_drops_out(rows: list[tuple[float, float, int]], shift: float) -> None:
    ours, theirs, clusters = zip(*rows, strict=True)
    moved = [[score + shift * cluster for score, _, cluster in zip(values, theirs, clusters, strict=True)]
             for values in (ours, theirs)]  # fmt: skip
    first, second = paired_difference(ours, theirs, clusters), paired_difference(*moved, clusters)
    assert second.difference == pytest.approx(first.difference, abs=1e-9)
    assert second.error == pytest.approx(first.error, abs=1e-7)


def test_answers_repeated_on_the_same_picture_add_no_certainty() -> None:
    once = paired_difference([1, 0, 1, 1], [0, 0, 1, 0], range(4))
    thrice = paired_difference([1, 0, 1, 1] * 3, [0, 0, 1, 0] * 3, [*range(4)] * 3)
    assert thrice.p_value == pytest.approx(once.p_value)


def test_macro_joins_the_pictures_of_several_tasks() -> None:
    # Both tasks weigh 1/2: difference (1/2 + 0) / 2. Picture a: (.5 / 2 + .5 / 2) / 2 = .25; picture b: -.25;
    # error^2 = 2 / 1 * (.0625 + .0625) = .25. As four pictures: 4/3 * 4 * .125^2 = .0833.
    ours, theirs = {"colour": [1, 0], "count": [1, 0]}, {"colour": [0, 0], "count": [0.5, 0.5]}
    shared = paired_macro_difference(ours, theirs, {"colour": ["a", "b"], "count": ["a", "b"]})
    apart = paired_macro_difference(ours, theirs, {"colour": ["a", "b"], "count": ["c", "d"]})
    assert (shared.difference, shared.error) == pytest.approx((0.25, 0.5))
    assert apart.error == pytest.approx(math.sqrt(4 / 3 * 4 * 0.125**2))


def test_nothing_is_claimed_of_one_picture_or_of_equal_differences() -> None:
    one = paired_difference([1.0, 1.0], [0.0, 0.0], ["a", "a"])
    assert (one.difference, one.error, one.low, one.p_value, one.minimum_difference) == (1.0, None, None, None, None)
    same = paired_difference([1.0, 0.0], [1.0, 0.0], ["a", "b"])
    assert (same.low, same.high, same.p_value, same.minimum_difference) == (0.0, 0.0, 1.0, None)


def test_the_smallest_difference_is_found_with_the_power_asked_for() -> None:
    smallest = smallest_difference(0.02)
    assert smallest == pytest.approx(2.801585 * 0.02, abs=1e-7)
    assert stats.norm.sf(stats.norm.ppf(0.975) - smallest / 0.02) == pytest.approx(0.8, abs=1e-5)
    assert pytest.approx(stats.norm.ppf(0.8), abs=1e-12) == Z80
    assert smallest_difference(0.0) is None


def test_standard_error_of_independent_scores() -> None:
    values = [1.0, 0.0, 0.5, 1.0, 0.0]
    assert standard_error(values, range(5)) == pytest.approx(stats.sem(values))


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 0.0])])
def test_other_questions_are_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="same questions"):
        paired_difference(ours, theirs, ["a"] * len(ours))
