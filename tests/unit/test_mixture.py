"""What a stage draws: weights, caps, repeats, balance and duplicates, as properties of the draw and by hand."""

from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlm.data.duplicates import decode_signatures, row_key, text_signature
from minivlm.data.mixture import Drawn, Fate, Rows, SourceRule, StageRule, draw, task_limits, weighted_limits

few = settings(max_examples=60)


def make_rows(count: int, *, source=0, task=0, text=None, pictures=None, held_out=False, files=1) -> Rows:
    """Rows numbered from 1; a number stands for all of them."""

    def column(values, dtype):
        return np.full(count, values, dtype) if np.ndim(values) == 0 else np.array(values, dtype)

    whole = [row_key([], [str(t)]) for t in (range(count) if text is None else text)]
    return Rows(
        source=column(source, np.int32),
        file=np.arange(count, dtype=np.int32) % files,
        row=np.arange(1, count + 1),
        task=column(task, np.int32),
        repeat=np.ones(count),
        pictures=column(0 if pictures is None else pictures, np.uint64),
        question=np.array(whole, np.int64).view(np.uint64),
        whole=np.array(whole, np.int64).view(np.uint64),
        is_held_out=column(held_out, bool),
        is_low_rated=np.zeros(count, bool),
        clip_score=np.full(count, np.nan, np.float32),
        signatures=np.zeros((count, 0), np.uint8),
    )


def with_texts(rows: Rows, texts: list[str]) -> Rows:
    return replace(rows, signatures=decode_signatures([text_signature([text]) for text in texts]))


def per_source(rows: Rows, drawn: Drawn, count: int) -> list[int]:
    return np.bincount(rows.source, weights=drawn.copies, minlength=count).astype(int).tolist()


@st.composite
def problems(draw_value) -> tuple[Rows, list[str], list[SourceRule], StageRule]:
    """A few dozen rows of up to three sources in two files, with any settings."""
    count = draw_value(st.integers(1, 40))

    def some(elements):
        return draw_value(st.lists(elements, min_size=count, max_size=count))

    rows = make_rows(
        count,
        source=some(st.integers(0, 2)),
        task=some(st.integers(0, 2)),
        text=some(st.integers(0, 20)),
        pictures=some(st.integers(0, 6)),
        held_out=some(st.sampled_from([False, False, False, True])),
        files=2,
    )
    rows = replace(rows, is_low_rated=np.array(some(st.sampled_from([False, False, True]))))
    rows = with_texts(rows, some(st.sampled_from(["a red ball on a mat", "a red ball on a hat", "two cups", ""])))
    rule = SourceRule(
        weight=draw_value(st.none() | st.floats(0.1, 10)),
        max_rows=draw_value(st.none() | st.integers(1, 20)),
        repeat=draw_value(st.sampled_from([0.3, 1.0, 2.0, 2.5])),
    )
    rules = [rule, replace(rule, weight=draw_value(st.none() | st.floats(0.1, 10))), SourceRule()]
    stage = StageRule(
        seed=draw_value(st.integers(0, 3)),
        duplicates=draw_value(st.sampled_from(["keep", "drop_equal", "drop_near"])),
        across_pictures=draw_value(st.booleans()),
        max_rows_per_picture=draw_value(st.none() | st.integers(1, 3)),
        max_draws_per_task=draw_value(st.none() | st.integers(1, 20)),
        task_exponent=draw_value(st.sampled_from([0.0, 0.5])),
    )
    return rows, ["/x/a.json", "/x/b.json"], rules, stage


@few
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_reading_never_changes_the_draw(problem, random):
    rows, files, sources, stage = problem
    drawn = draw(rows, files, sources, stage)
    order = list(range(len(rows.row)))
    random.shuffle(order)
    other = rows.take(np.array(order))
    swapped = replace(other, file=1 - other.file)
    again = draw(swapped, files[::-1], sources, stage)
    assert again.copies.tolist() == drawn.copies[order].tolist()
    assert again.fate.tolist() == drawn.fate[order].tolist()


@few
@given(problems())
def test_every_row_has_one_reason_and_is_drawn_for_none(problem):
    rows, files, sources, stage = problem
    drawn = draw(rows, files, sources, stage)
    trains = ~rows.is_held_out
    assert ((drawn.copies > 0) == ((drawn.fate == Fate.DRAWN) & trains)).all()
    assert (drawn.fate[~trains] == Fate.DRAWN).all()  # never dropped either


@few
@given(problems())
def test_dropping_duplicates_twice_drops_no_more_and_keeps_the_first(problem):
    rows, files, _, stage = problem
    rule = StageRule(duplicates=stage.duplicates, across_pictures=stage.across_pictures)
    plain = [SourceRule()] * 3
    first = draw(rows, files, plain, rule)
    kept = (first.fate == Fate.DRAWN) | rows.is_held_out
    second = draw(rows.take(np.flatnonzero(kept)), files, plain, rule)
    assert (second.fate == Fate.DRAWN).all()
    order = np.lexsort((rows.row, rows.file, rows.source))
    for place in np.flatnonzero(first.fate == Fate.DUPLICATE):
        equal = [i for i in order if rows.whole[i] == rows.whole[place] and not rows.is_held_out[i]]
        earlier = equal[: equal.index(place)]
        assert any(first.fate[i] == Fate.DRAWN or first.fate[i] == Fate.NEAR_DUPLICATE for i in earlier)


@few
@given(st.integers(0, 60), st.integers(0, 5))
def test_no_row_is_lost_without_a_setting(count, seed):
    drawn = draw(make_rows(count, source=np.arange(count) % 2), ["a"], [SourceRule()] * 2, StageRule(seed))
    assert drawn.copies.tolist() == [1] * count


@few
@given(st.lists(st.integers(1, 200), min_size=2, max_size=4), st.data())
def test_weights_are_met_within_half_a_row_and_one_source_is_used_whole(counts, data):
    weights = [data.draw(st.floats(0.05, 20)) for _ in counts]
    rows = make_rows(sum(counts), source=np.repeat(np.arange(len(counts)), counts))
    drawn = draw(rows, ["a"], [SourceRule(weight=weight) for weight in weights], StageRule())
    draws = per_source(rows, drawn, len(counts))
    unit = min(count / weight for count, weight in zip(counts, weights, strict=True))
    for number, weight in zip(draws, weights, strict=True):
        assert abs(number - unit * weight) <= 0.5 + 1e-9
    assert any(number == count for number, count in zip(draws, counts, strict=True))
    assert drawn.copies.max() <= 1


def test_a_source_without_weight_is_used_whole_beside_weighted_ones():
    assert weighted_limits(np.array([100.0, 30.0, 7.0]), [3.0, 1.0, None]).tolist() == [90, 30, 7]


def test_repeats_are_exact_and_extra_copies_differ_by_seed():
    rows = make_rows(40)
    copies = [draw(rows, ["a"], [SourceRule(repeat=2.25)], StageRule(seed)).copies for seed in (0, 1)]
    for drawn in copies:
        assert Counter(drawn.tolist()) == {2: 30, 3: 10}
    assert copies[0].tolist() != copies[1].tolist()
    quarter = draw(rows, ["a"], [SourceRule(repeat=0.25)], StageRule())
    assert Counter(quarter.copies.tolist()) == {0: 30, 1: 10}
    assert (quarter.fate == Fate.NOT_REPEATED).sum() == 30


def test_repeat_of_a_source_multiplies_that_of_its_files():
    rows = replace(make_rows(8), repeat=np.array([0.5] * 4 + [3.0] * 4))
    drawn = draw(rows, ["a"], [SourceRule(repeat=2.0)], StageRule())
    assert drawn.copies.tolist() == [1] * 4 + [6] * 4


def test_max_rows_counts_different_rows_before_they_are_repeated():
    drawn = draw(make_rows(50), ["a"], [SourceRule(max_rows=7, repeat=2.0)], StageRule())
    assert Counter(drawn.copies.tolist()) == {0: 43, 2: 7}
    assert (drawn.fate == Fate.OVER_MAX_ROWS).sum() == 43


def test_tasks_are_thinned_hard_or_softly_and_rare_ones_stay():
    tasks = np.repeat([0, 1, 2], [400, 100, 3])
    rows = make_rows(503, task=tasks)
    for exponent, expected in ((0.0, [100, 100, 3]), (0.5, [200, 100, 3])):
        rule = StageRule(max_draws_per_task=100, task_exponent=exponent)
        drawn = draw(rows, ["a"], [SourceRule()], rule)
        assert np.bincount(tasks, weights=drawn.copies).tolist() == expected  # 100 * (400 / 100) ** 0.5 = 200
    assert task_limits(np.array([400.0]), 100, 0.5).tolist() == [200]


def test_thinning_takes_further_copies_before_whole_rows():
    drawn = draw(make_rows(10), ["a"], [SourceRule(repeat=3.0)], StageRule(max_draws_per_task=14))
    assert Counter(drawn.copies.tolist()) == {1: 6, 2: 4}


def test_low_quality_goes_first_and_what_has_no_score_stays():
    rows = make_rows(4, text=["same", "same", "b", "c"])
    scores = np.array([0.1, 0.3, 0.2, np.nan], np.float32)
    rows = replace(rows, clip_score=scores, is_low_rated=np.array([False, False, True, False]))
    drawn = draw(rows, ["a"], [SourceRule(min_clip_score=0.25)], StageRule(duplicates="drop_equal"))
    assert drawn.fate.tolist() == [Fate.LOW_CLIP_SCORE, Fate.DRAWN, Fate.LOW_RATING, Fate.DRAWN]


def test_rows_per_picture_keeps_the_first_and_rows_of_text():
    rows = make_rows(6, pictures=[5, 5, 7, 5, 0, 0])
    drawn = draw(rows, ["a"], [SourceRule()], StageRule(max_rows_per_picture=1))
    assert drawn.copies.tolist() == [1, 0, 1, 0, 1, 1]


def test_a_training_row_that_asks_a_held_out_question_is_left_out():
    rows = make_rows(3, text=["asked", "asked", "other"], held_out=[True, False, False])
    drawn = draw(rows, ["a"], [SourceRule()], StageRule(duplicates="drop_equal"))
    assert drawn.fate.tolist() == [Fate.DRAWN, Fate.LEAK, Fate.DRAWN]
    assert draw(rows, ["a"], [SourceRule()], StageRule()).copies.tolist() == [0, 1, 1]


BALL = "A small red ball lies on the green mat beside the open door of the old wooden house"


def test_nearly_the_same_text_about_the_same_picture_is_dropped_and_reported():
    texts = [BALL, BALL.replace("old ", ""), "Two cups stand on a table next to a lamp", BALL.upper() + "  "]
    rows = with_texts(make_rows(4, text=[*texts[:3], BALL], pictures=3), texts)
    drawn = draw(rows, ["a"], [SourceRule()], StageRule(duplicates="drop_near"))
    assert drawn.fate.tolist() == [Fate.DRAWN, Fate.NEAR_DUPLICATE, Fate.DRAWN, Fate.DUPLICATE]


@pytest.mark.parametrize(("across", "left"), [(False, [1, 1]), (True, [1, 0])])
def test_other_pictures_are_compared_only_where_asked(across, left):
    rows = with_texts(make_rows(2, pictures=[1, 2]), [BALL, BALL + "."])
    rule = StageRule(duplicates="drop_near", across_pictures=across)
    assert draw(rows, ["a"], [SourceRule()], rule).copies.tolist() == left


def test_no_column_is_forgotten_when_rows_are_joined():
    rows = Rows.join([make_rows(2), make_rows(3)])
    assert {len(getattr(rows, item.name)) for item in fields(Rows)} == {5}


def test_a_training_row_that_nearly_says_what_a_held_out_one_does_is_left_out():
    rows = with_texts(make_rows(2, held_out=[False, True]), [BALL, BALL + "."])
    drawn = draw(rows, ["a"], [SourceRule()], StageRule(duplicates="drop_near"))
    assert drawn.fate.tolist() == [Fate.NEAR_DUPLICATE, Fate.DRAWN]


def test_half_a_row_is_rounded_up():
    assert draw(make_rows(3), ["a"], [SourceRule(repeat=1.5)], StageRule()).copies.sum() == 5
