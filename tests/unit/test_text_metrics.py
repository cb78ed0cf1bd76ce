"""Short-answer metrics on vectors computed by hand from the published formulas."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlm.scoring.text_metrics import anls, edit_distance, relaxed_match, vqa_accuracy, vqa_normalize


@pytest.mark.parametrize(
    ("prediction", "truth", "right"),
    [
        ("95", "100", True),  # |95 - 100| / 100 = 0.05
        ("94.9", "100", False),
        ("105", "100", True),
        ("-95", "-100", True),
        ("25%", "0.25", True),
        ("25%", "25", False),  # a hundredth of it
        ("25%", "26%", True),
        ("0", "0", True),
        ("0.0", "0", False),  # a truth of 0 is text
        ("Red", "red", True),
        ("red.", "red", False),  # nothing is stripped
        (" red", "red", False),
        ("1,000", "1000", False),  # a comma makes it text
        ("", "", True),
        ("nan", "5", False),
    ],
)
def test_relaxed_match(prediction: str, truth: str, right: bool) -> None:
    assert relaxed_match(prediction, truth) is right


@pytest.mark.parametrize(
    ("prediction", "truths", "score"),
    [
        ("hello", ["hello"], 1.0),
        ("HELLO  world", ["hello world"], 1.0),  # distance after blanks were made single
        ("helo", ["hello"], 0.8),  # 1 - 1/5
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("abcd", ["abxy"], 0.5),  # at the threshold it counts
        ("abcde", ["abxyz"], 0.0),  # 0.4 does not
        ("helo", ["world", "hello"], 0.8),  # the nearest truth
        ("", ["hello"], 0.0),
        ("helo    x", ["helo x"], 1.0),
        ("helo    y", ["helo x"], 1 - 1 / 9),  # the length is that of the text as it stands
    ],
)
def test_anls(prediction: str, truths: list[str], score: float) -> None:
    assert anls(prediction, truths) == pytest.approx(score)


def table_distance(left: str, right: str) -> int:
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            previous, row[j] = row[j], min(previous + (a != b), row[j] + 1, row[j - 1] + 1)
    return row[-1]


@settings(max_examples=50)
@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_edit_distance_is_that_of_the_table(left: str, right: str) -> None:
    assert edit_distance(left, right) == table_distance(left, right)


def test_edit_distance_of_long_texts_is_quick() -> None:
    assert edit_distance("ab" * 5000, "ba" * 5000) == 2


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Two dogs.", "2 dogs"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the reference's own mistake
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("none", "0"),
        ("mid-air", "mid air"),  # no blank beside the mark: it becomes one
        ("mid- air", "mid air"),
        ("x- b-c", "x bc"),  # one blank beside one of them: all go
        ("what's up?", "what 's up"),
        ("yes\nno", "yes no"),
        ("." * 40, "." * 8),  # only the first 32 go
    ],
)
def test_vqa_normalize(text: str, normal: str) -> None:
    assert vqa_normalize(text) == normal


@pytest.mark.parametrize(
    ("matching", "score"),
    [(0, 0.0), (1, 9 * (1 / 3) / 10), (2, (2 * 1 / 3 + 8 * 2 / 3) / 10), (3, (3 * 2 / 3 + 7) / 10), (4, 1.0)],
)
def test_vqa_accuracy_leaves_one_out(matching: int, score: float) -> None:
    answers = ["two"] * matching + [f"other {i}" for i in range(10 - matching)]
    assert vqa_accuracy("2", answers) == pytest.approx(score)  # 0.3, 0.6, 0.9 for one, two, three of ten


def test_no_truth_is_an_error() -> None:
    for metric in (anls, vqa_accuracy):
        with pytest.raises(ValueError, match="at least one"):
            metric("x", [])


@settings(max_examples=25)
@given(st.text(max_size=300), st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_any_text_has_a_score(prediction: str, truths: list[str]) -> None:
    assert 0 <= anls(prediction, truths) <= 1
    assert 0 <= vqa_accuracy(prediction, truths) <= 1
    assert relaxed_match(prediction, truths[0]) in (True, False)
