"""Answers out of free text: what each rule finds in ugly inputs, and that no text stops it."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlm.scoring.extraction import (
    choice_letter,
    contains_answer,
    contains_formula,
    final_answer,
    is_letter,
    is_math_answer,
    last_number,
    starts_with_letter,
)
from minivlm.scoring.scorers import SCORERS, Attempt

OPTIONS = ("a red cat", "a dog", "two birds", "none of these")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Because.\nFinal answer: 12", "12"),
        ("Answer: 3\nNo wait.\nAnswer:\n\n  **4** ", "4"),  # the last one, on the next line
        ("So \\boxed{\\frac{1}{2}} it is. Answer: 7", "\\frac{1}{2}"),
        ("\\boxed{} Answer: 7", "7"),
        ("\\boxed{never closed. The answer is 5", "5"),
        ("答案：红色", "红色"),
        ("The answer is: B.", "B."),
        ("Final answer:", None),
        ("just text", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(C)", "C"),
        ("B.", "B"),
        ("**D**", "D"),
        ("B. a dog", "B"),
        ("c) two birds", "C"),
        ("Option C because of the wings", "C"),
        ("The answer is (B).", "B"),
        ("Answer: B\nanswer: D", "D"),
        ("First (A) seems right, but (C) is.", "C"),
        ("It must be C then", "C"),
        ("A dog", "B"),  # the option's text, though it starts with a capital A
        ("A cat and a bird are there", None),  # an article
        ("I see two birds here", "C"),
        ("\\boxed{D}", "D"),
        ("E", None),  # there is no such option
        ("e.g. this", None),
        ("", None),
        ("cats or dogs", None),
        ("B\n\nExplanation: option A shows a cat.", "B"),
        ("Option A shows a cat.\n\nB", "B"),
        ("Option A is incorrect. Option B is correct.", "B"),
        ("Option B is wrong. Option A is correct.", "A"),
        ("Option B isn't correct, option A is.", "A"),
        ("The answer is B, since option A is wrong", "B"),
        ("The answer is B because option A shows a cat", "B"),
        ("(B) is right, (A) is wrong", "B"),
        ("C, not A", "C"),
        ("It cannot be (A), rather (C), not option B", "C"),
        ("Neither A nor B, so D", "D"),
        ("The answer is not A.", None),
        ("Option A is incorrect.", "A"),  # as to "Which is incorrect?"
        ("B is not red", "B"),
        ("选B", "B"),
        ("答案：选B", "B"),
        ("答案是（C）。", "C"),
        ("不选A，选B", "B"),
        ("选项A错误，选项B正确", "B"),
        ("选CT", None),
    ],
)
def test_choice_letter(text: str, letter: str | None) -> None:
    assert choice_letter(text, OPTIONS) == letter


def test_a_letter_alone_is_a_letter_even_where_it_is_a_word() -> None:
    assert choice_letter("A", OPTIONS) == "A"


def test_rules_of_the_benchmarks_themselves() -> None:
    texts = ["B", "B. a dog", "(B)", "the answer is b", "banana"]
    assert [is_letter(text, "B") for text in texts] == [True, True, False, False, False]
    assert [starts_with_letter(text, "B") for text in texts] == [True] * 5  # MMStar's takes a banana for B


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("about 1,250.5 kg", 1250.5),
        ("3 of 14", 14.0),
        ("-7", -7.0),
        ("−7", -7.0),
        ("none", None),
        ("1.2.3", 1.2),
        ("12 cm^2", 12.0),
        ("12 cm^{2}", 12.0),
        ("10^-3", 10.0),
        ("5 out of 10", 5.0),
        ("1,000 out of 2,500.", 1000.0),
    ],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "truth", "choices", "right"),
    [
        ("The answer is 14 cm", "14", (), True),
        ("Answer: 1.50", "1.5", (), True),
        ("1.46", "1.5", (), True),  # one decimal
        ("3.7", "3", (), False),
        ("3.0", "3", (), True),
        ("\\boxed{[1, 2]}", "[1, 2]", (), True),
        ("Yes", "yes", (), True),
        ("B", "145°", ("35°", "145°"), True),
        ("145°", "145°", ("35°", "145°"), True),
        ("A", "145°", ("35°", "145°"), False),
        ("", "3", (), False),
    ],
)
def test_math_answers(text: str, truth: str, choices: tuple[str, ...], right: bool) -> None:
    assert is_math_answer(text, truth, choices) is right


def test_substrings_of_ocrbench() -> None:
    assert contains_answer("The text reads 'CENTRE\nst'.", ["Centre ST"])
    assert not contains_answer("", ["x"])
    assert contains_formula("it is  X ^ 2", ["X^2"])
    assert not contains_formula("x^2", ["X^2"])


TRUTHS = {"choice": ("B",), "pope": ("no",), "mme": ("yes",), "vqa": ("red", "red", "blue", "12")}
UGLY = st.one_of(
    st.text(max_size=200),
    st.text("AB()[].:{}\\boxed answerfinal:12345,.-% \n答案", max_size=300),
)


@settings(max_examples=40)
@given(UGLY)
def test_every_scorer_has_a_score_for_any_text(text: str) -> None:
    for name, scorer in SCORERS.items():
        attempt = Attempt(text, TRUTHS.get(name, ("12",)), OPTIONS if name == "choice" else (), "color/1")
        verdict = scorer.judge(attempt)
        assert 0 <= verdict.score <= 1, name
        assert text.strip() or verdict.score == 0 or name == "caption_tokens", name
        assert all(isinstance(value, float) for value in scorer.total([attempt], [verdict]).values())


@pytest.mark.parametrize(
    "unit", ["9", "\\boxed{", "answer is ", "A ", " ", "1,", "(", "答案: ", "not ", "选", "option A is ", "5 out of "]
)
def test_hostile_texts_take_no_time(unit: str) -> None:
    text = unit * (30_000 // len(unit))
    started = time.process_time()
    for name, scorer in SCORERS.items():
        scorer.judge(Attempt(text, TRUTHS.get(name, ("12",)), OPTIONS if name == "choice" else ()))
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("name", "truths", "choices", "reason"),
    [
        ("vqa", ("a", "b", "c"), (), "3 answers"),
        ("pope", ("maybe",), (), "'maybe' is not yes or no"),
        ("choice", ("E",), OPTIONS, "none of A to D"),
        ("choice", ("A",), ("one",), "1 options"),
        ("math", ("7",), ("1", "2"), "none of the 2 choices"),
        ("anls", (" ",), (), "empty"),
        ("anls", ("x",), (), None),
        ("choice", ("D",), OPTIONS, None),
    ],
)
def test_a_truth_that_does_not_fit_is_named(
    name: str, truths: tuple[str, ...], choices: tuple[str, ...], reason: str | None
) -> None:
    found = SCORERS[name].unfit(truths, choices)
    assert found is None if reason is None else reason in str(found)


def test_figures_of_multiple_choice_by_group() -> None:
    attempts = [Attempt(text, ("B",), OPTIONS, group) for text, group in (("B", "x"), ("A", "x"), ("so, B", "y"))]
    scorer = SCORERS["choice"]
    figures = scorer.total(attempts, [scorer.judge(attempt) for attempt in attempts])
    assert figures == {
        "letter_only": 1 / 3, "first_letter": 1 / 3, "unclear": 0.0, "group/x": 0.5, "group/y": 1.0, "group_mean": 0.75,
    }  # fmt: skip


def test_figures_of_pope_by_both_readings() -> None:
    rows = [
        ("yes", "yes", "random"),
        ("Yes, it is.", "yes", "random"),
        ("no", "no", "popular"),
        ("sure", "no", "popular"),
    ]
    attempts = [Attempt(text, (truth,), (), group) for text, truth, group in rows]
    scorer = SCORERS["pope"]
    verdicts = [scorer.judge(attempt) for attempt in attempts]
    figures = scorer.total(attempts, verdicts)
    assert [verdict.score for verdict in verdicts] == [1, 0, 1, 0]
    assert (figures["accuracy"], figures["recall"], figures["precision"], figures["unclear"]) == (0.5, 0.5, 1.0, 0.5)
    assert (figures["loose/accuracy"], figures["loose/recall"], figures["loose/precision"]) == (0.75, 1.0, 2 / 3)
    assert (figures["yes_ratio"], figures["loose/yes_ratio"]) == (0.25, 0.75)
    assert (figures["loose/f1/random"], figures["f1/popular"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("name", "truth", "thought", "answer", "wrong"),
    [
        ("pope", "yes", "There is nothing in sight.", "Yes", "No"),
        ("mme", "no", "Yes, there is a car, but it is blue.", "No", "Yes"),
        ("contains", "4", "I see 12 cars, 4 of them red.", "4", "12"),
        ("contains_formula", "X^2", "It is X^2 or Y^2.", "X ^ 2", "Y^2"),
    ],
)
def test_of_a_chain_of_thought_only_the_final_answer_is_judged(
    name: str, truth: str, thought: str, answer: str, wrong: str
) -> None:
    scorer = SCORERS[name]
    for said, score in ((answer, 1.0), (wrong, 0.0)):
        attempt = Attempt(f"{thought}\nFinal answer: {said}", (truth,), (), "color/1")
        verdict = scorer.judge(attempt)
        figures = scorer.total([attempt], [verdict])
        by_set = {key: figures[key] for key in ("accuracy", "loose/accuracy") if key in figures}
        assert {verdict.score, *by_set.values()} == {score}
        assert len(by_set) == {"pope": 2, "mme": 1}.get(name, 0)
