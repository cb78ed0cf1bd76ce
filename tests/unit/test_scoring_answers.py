"""Answers are found and compared as a person would, on clean and on ugly text."""

import pytest

from minivlm.scoring.answers import extract_answer, is_correct, normalize


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("There are 2 red shapes.\nFinal answer: 2", "2"),
        ("2 + 1 = 3\nfinal  ANSWER :  3  ", "3"),
        ("**Final answer:** red", "red"),
        ("Final answer: **blue**\n", "blue"),
        ("Final answer: 1\nNo, wait.\nFinal answer: 4", "4"),
        ("Final answer:\n\n 7", "7"),
        ("左边有两个,右边有一个。\n答案：3", "3"),
        ("答案: 红色", "红色"),
        ("Final answer:", None),
        ("Final answer: ** \n", None),
        ("I think it is red.", None),
        ("The final answerer: Bob", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  The Red   circle. ", "red circle"),
        ("a", "a"),
        ("(A)", "a"),
        ("B.", "b"),
        ("Three", "3"),
        ("two squares", "2 squares"),
        ("３", "3"),
        ("三个", "3"),
        ("十二个", "12"),
        ("二十", "20"),
        ("两", "2"),
        ("1,000", "1000"),
        ("1,00", "1,00"),
        ("是的。", "是"),
        ("“STOP”", "stop"),
        ("\u00a0No!\n", "no"),
        ("...", ""),
    ],
)
def test_normalize(text: str, plain: str) -> None:
    assert normalize(text) == plain


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("A dog.", "dog"),
        ("Look: two.\nFinal answer: 2", "two"),
        ("3.0", "3"),
        ("Yes, there is a circle.", "yes"),
        ("no", "No."),
        ("三个", "3"),
        ("红色。", "红色"),
        ("?", "?"),
        ("-2", "-2.0"),
    ],
)
def test_is_correct(text: str, truth: str) -> None:
    assert is_correct(text, truth)


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("", "red"),
        ("   \n", "red"),
        ("red or blue", "red"),
        ("2\nFinal answer:", "2"),
        ("2\nFinal answer: 3", "2"),
        ("yes and no", "yes"),
        ("There is yes", "yes"),
        ("nothing", "no"),
        ("12", "1"),
        ("-2", "2"),
        ("nan", "inf"),
        ("?", "red"),
        ("", "?"),
    ],
)
def test_is_not_correct(text: str, truth: str) -> None:
    assert not is_correct(text, truth)
