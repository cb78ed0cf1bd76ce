"""Right and wrong by each verifier, on cases to check by hand; most of all what must never count as right."""

import re
from typing import get_args

import pytest

from minivlm.config.data import VerifierName
from minivlm.scoring.answers import extract_answer
from minivlm.scoring.verifiers import VERIFIERS, fix_answer, option_letter, verify

CASES = [
    ("exact", "Three.", "3", True),
    ("exact", "3.1", "3", False),
    ("exact", ".5", "5", False),
    ("exact", "1" * 400, "2" * 400, False),  # both infinite as floats
    ("relaxed", "104", "100", True),
    ("relaxed", "106", "100", False),
    ("relaxed", "10%", "10%", True),
    ("relaxed", "1,040", "1000.", True),
    ("relaxed", "2020", "2019", False),
    ("relaxed", "2019", "2019", True),
    ("relaxed", "Rome", "Roma", False),
    ("anls", "John  Smith", "john smith", True),
    ("anls", "Jon Smith Senior", "John Smith Senior", True),  # 1 - 1 / 17
    ("anls", "Mary Jones", "John Smith", False),  # InternVL's inverted check takes it
    ("anls", "invoice 1234567890", "invoice 1234567891", False),  # 1 - 1 / 18, but another number
    ("choice", "(B) the red one", "B", True),
    ("choice", "b.", "B", True),
    ("choice", "The answer is C", "C", True),
    ("choice", "A red ball", "A", False),
    ("choice", "A or B", "A", False),
    ("choice", "(A) and (B)", "A", False),
    ("choice", "选B", "B", True),
    *[("choice", text, "A", False) for text in
      ("A、B", "选A、B、C", "A. B. C. D.", "(A), B", "(A) no, B", "A: red B: blue")],
    *[("choice", text, "C", True) for text in ("C. a cat", "C. vitamin D.", "(C) at 5 p.m.", "C: I see a cat")],
    ("numeric", "3.1416", "3.1415", True),
    ("numeric", "3.15", "3.14", False),
    ("numeric", "5 cm", "5", True),
    ("numeric", "5 mm", "5 cm", False),
    ("numeric", "45 degrees", "45°", True),
    ("numeric", "\\frac{1}{2}", "0.5", True),
    ("numeric", "1/0", "1", False),
    ("numeric", "0.001", "0", False),
    ("numeric", "-3", "3", False),
    ("numeric", "3 or 4", "3", False),
    ("numeric", "5", "1e400", False),
    ("numeric", "1e400", "5", False),
    ("vqa", "a dog", "dog", True),
    ("vqa", "dont", "don't", True),
    ("vqa", "dogs", "dog", False),
    ("vqa", "!", "?", False),
]  # fmt: skip


@pytest.mark.parametrize(("verifier", "answer", "truth", "expected"), CASES)
def test_verifiers(verifier: str, answer: str, truth: str, expected: bool) -> None:
    assert verify(answer, truth, verifier) is expected


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_each_takes_what_is_exact_and_nothing_empty(verifier: str) -> None:
    assert verify("**B.**", "B", verifier)
    assert not verify("  ", "B", verifier)
    assert not verify("", "", verifier)


def test_the_settings_know_the_same_verifiers() -> None:
    assert get_args(VerifierName) == tuple(VERIFIERS)
    with pytest.raises(ValueError, match=re.escape("`loose`: type one of exact, relaxed")):
        verify("a", "a", "loose")


@pytest.mark.parametrize(
    ("text", "letter"),
    [("A", "A"), ("(b)", "B"), ("C. a cat", "C"), ("d) x", "D"), ("**A**", "A"), ("A: 3", "A"), ("option e", "E"),
     ("Ａ", "A"), ("选项C", "C"), ("cat", None), ("3", None), ("", None), ("A cat", None), ("a or b", None)],
)  # fmt: skip
def test_option_letters(text: str, letter: str | None) -> None:
    assert option_letter(text) == letter


@pytest.mark.parametrize(
    ("written", "truth", "fixed"),
    [
        ("So.\n**Final answer: the dog.**", "dog", "So.\nFinal answer: dog"),
        ("So.\n\nFinal answer: (B) red", "B", "So.\n\nFinal answer: B"),
        ("30,594 it is.\nFinal answer: 30594", "30,594", "30,594 it is.\nFinal answer: 30,594"),
        ("So.\nFinal answer: 10", "1", None),  # a substring, which MMPR turns into the truth
        ("So.\nFinal answer: 3 or 4", "3", None),
        ("So.\nFinal answer: not red", "red", None),
        ("So.\nFinal answer: yes and no", "yes", None),
        ("So.\nFinal answer: 3 red and 2 blue", "3", None),
        ("So.\n答案：不是红色", "红色", None),
        ("So.\n答案：红色。", "红色", "So.\n答案：红色"),
    ],
)
def test_an_answer_takes_the_truths_spelling_only_where_it_says_the_truth(
    written: str, truth: str, fixed: str | None
) -> None:
    answer = extract_answer(written)
    assert answer is not None
    assert fix_answer(written, answer, truth) == (fixed or written)
