"""The rules that make chosen/rejected pairs, on cases small enough to check by hand."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivlm.preferences.pairs import Asked, choose_pairs, entails, is_well_formed, judge, keep_minority
from minivlm.scoring.text_metrics import edit_distance

RIGHT = "I see 2 and 1.\nFinal answer: 3"
WRONG = "I see 2 and 2.\nFinal answer: 4"
BROKEN = "I see 2 and 1, so 3."
THREE = Asked("3", reasoned=True)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (RIGHT, True),
        ("两个和一个。\n答案：3", True),
        ("2 + 1. Final answer: 3\n", True),
        (BROKEN, False),
        ("Final answer: 3", False),
        ("Well.\nFinal answer: 3\nOr not.", False),
        ("Well.\nFinal answer: 3\nFinal answer: 3", False),
        ("Well.\nFinal answer:", False),
        ("", False),
    ],
)
def test_reasoned_form(text: str, good: bool) -> None:
    assert is_well_formed(text, reasoned=True) is good


def test_direct_form_has_no_marker() -> None:
    assert is_well_formed("red", reasoned=False)
    assert not is_well_formed(RIGHT, reasoned=False)
    assert not is_well_formed("  ", reasoned=False)


def test_a_right_value_in_a_broken_form_is_malformed() -> None:
    assert [judge(text, THREE).verdict for text in (BROKEN, RIGHT, WRONG)] == ["malformed", "right", "wrong"]


def test_right_times_wrong() -> None:
    result = choose_pairs([RIGHT, WRONG], THREE, max_pairs=2, seed="q1")
    assert [(p.chosen, p.rejected, p.kind) for p in result.pairs] == [(RIGHT, WRONG, "correctness")]


@pytest.mark.parametrize(
    ("answers", "reason"),
    [([RIGHT, RIGHT], "question_all_right"), ([WRONG, BROKEN], "question_without_right_answer")],
)
def test_one_sided_questions_give_no_pair(answers: list[str], reason: str) -> None:
    result = choose_pairs(answers, THREE, max_pairs=2, seed="q1")
    assert result.pairs == []
    assert result.drops[reason] == 1


def test_identical_texts_count_once() -> None:
    result = choose_pairs([RIGHT, RIGHT + " ", WRONG, WRONG], THREE, max_pairs=9, seed="q1")
    assert len(result.pairs) == 1
    assert result.drops["identical_text"] == 2


def test_cap_spreads_over_different_texts() -> None:
    right = [f"{i} then.\nFinal answer: 3" for i in range(2)]
    wrong = [f"{i} then.\nFinal answer: {i}" for i in (4, 5, 6)]
    result = choose_pairs(right + wrong, THREE, max_pairs=2, seed="q1")
    assert len({p.chosen for p in result.pairs}) == len({p.rejected for p in result.pairs}) == 2
    assert result.drops["over_question_cap"] == 4


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 49))
def test_no_text_comes_twice_before_every_other_of_its_side_once(rights: int, wrongs: int, cap: int) -> None:
    right = [f"{i} then.\nFinal answer: 3" for i in range(rights)]
    wrong = [f"{i} then.\nFinal answer: {i + 10}" for i in range(wrongs)]
    pairs = choose_pairs(right + wrong, THREE, max_pairs=cap, seed="q1").pairs
    assert len({(pair.chosen, pair.rejected) for pair in pairs}) == len(pairs) == min(cap, rights * wrongs)
    for texts, side in ((right, [p.chosen for p in pairs]), (wrong, [p.rejected for p in pairs])):
        uses = [side.count(text) for text in texts]
        assert max(uses) - min(uses) <= 1


def test_choice_depends_on_the_seed_and_not_on_the_order_of_answers() -> None:
    answers = [f"{i}.\nFinal answer: {i}" for i in range(9)] + [f"{i} so.\nFinal answer: 3" for i in range(9)]
    first = choose_pairs(answers, THREE, max_pairs=2, seed="q1").pairs
    assert choose_pairs(answers[::-1], THREE, max_pairs=2, seed="q1").pairs == first
    assert choose_pairs(answers, THREE, max_pairs=2, seed="q2").pairs != first


@pytest.mark.parametrize(
    ("chosen", "rejected", "skipped"),
    [
        ("dog", "a dog and a cat", True),
        ("3", "3 or 4", True),
        ("1", "10", False),
        ("2", "2.5", False),
        ("no", "nothing", False),
        ("红", "红色", True),
        ("A", "B. a dog", False),  # an article, no letter
        ("A", "A. a dog", True),
        ("5", "-5", False),
        ("5", "3-5", True),
        ("So.\nFinal answer: dog", "Dog here.\nFinal answer: cat", False),
    ],
)
def test_entailment(chosen: str, rejected: str, skipped: bool) -> None:
    assert entails(chosen, rejected) is skipped


def test_entailed_pair_is_dropped_and_counted() -> None:
    result = choose_pairs(["dog", "dog and cat"], Asked("dog", reasoned=False), max_pairs=2, seed="q1")
    assert result.pairs == []
    assert result.drops["entailment"] == 1


def test_a_broken_form_is_rejected_and_tagged() -> None:
    result = choose_pairs([RIGHT, BROKEN], THREE, max_pairs=2, seed="q1")
    assert [(p.rejected, p.kind) for p in result.pairs] == [(BROKEN, "format")]


def test_format_pairs_stay_a_minority() -> None:
    kinds = ["correctness"] * 8 + ["format"] * 8
    kept = keep_minority(kinds, seed=0)
    assert len(kept) == 10
    assert kept[:8] == list(range(8))
    assert keep_minority(["format"] * 5, seed=0) == []
    assert len(keep_minority(["correctness"] * 172 + ["format"] * 99, seed=0)) == 172 + 43  # a fifth of 215


def test_a_wrong_reading_of_a_document_is_never_chosen() -> None:
    """Texts at every distance from the truth: only those that differ in at most a tenth of their characters, and in no
    digit, are chosen."""
    truth = "Invoice 4711 of Miller and Sons"
    random = Random(0)
    readings = ["".join(random.choice("ab47") if random.random() < share else char for char in truth)
                for share in (0.0, 0.02, 0.05, 0.2, 0.5, 1.0) for _ in range(20)]  # fmt: skip
    asked = Asked(truth, reasoned=False, verifier="anls")
    made = choose_pairs([*readings, truth[::-1], "4711"], asked, max_pairs=10_000, seed="q1")
    assert len(made.pairs) > 100
    for pair in made.pairs:
        assert edit_distance(pair.chosen, truth) <= 0.1 * len(truth)
        assert [char for char in pair.chosen if char.isdigit()] == list("4711")


def test_at_most_mmprs_fifteen_pairs_of_a_question() -> None:
    answers = [f"{i} then.\nFinal answer: {3 + i % 2}" for i in range(32)]
    assert len(choose_pairs(answers, THREE, max_pairs=15, seed="q1").pairs) == 15


def test_more_broken_forms_fill_the_room_that_is_left() -> None:
    broken = [f"{i}, so 3." for i in range(4)]
    made = choose_pairs([RIGHT, WRONG, *broken], THREE, max_pairs=4, max_format_pairs=9, seed="q1")
    assert [pair.kind for pair in made.pairs] == ["correctness"] + 3 * ["format"]
    none = choose_pairs([RIGHT, WRONG, *broken], THREE, max_pairs=4, max_format_pairs=0, seed="q1")
    assert [pair.kind for pair in none.pairs] == ["correctness"]


def test_right_answers_take_the_truths_spelling_where_asked() -> None:
    dog = Asked("dog", reasoned=True, fixes=True)
    answers = ["A tail.\nFinal answer: **the dog.**", "A tail.\nFinal answer: dog", "Ears.\nFinal answer: cat"]
    made = choose_pairs(answers, dog, max_pairs=9, seed="q1")
    assert [(p.chosen, p.rejected) for p in made.pairs] == [("A tail.\nFinal answer: dog", answers[2])]
    assert made.drops["identical_text"] == 1


@pytest.mark.parametrize(
    ("truth", "answer"),
    [("red", "red and blue"), ("red", "blue instead of red"), ("red", "isn’t red"), ("red", "dark red"),
     ("dog", "dog and cat"), ("dog", "hot dog"), ("dog", "maybe dog"), ("猫", "熊猫"), ("红色", "粉红色")],
)  # fmt: skip
def test_no_spelling_makes_a_wrong_answer_right(truth: str, answer: str) -> None:
    judged = judge(f"I look.\nFinal answer: {answer}", Asked(truth, reasoned=True, fixes=True))
    assert (judged.verdict, judged.answer) == ("wrong", answer)


def test_answers_that_were_cut_off_are_counted_and_make_no_pair() -> None:
    made = choose_pairs([RIGHT, None, WRONG, None], THREE, max_pairs=9, seed="q1")
    assert [(pair.chosen, pair.rejected) for pair in made.pairs] == [(RIGHT, WRONG)]
    assert (made.verdicts["malformed"], made.drops["answer_unfinished"]) == (2, 2)
    none = choose_pairs([RIGHT, None], THREE, max_pairs=9, seed="q1")
    assert (none.pairs, none.drops["question_all_right"]) == ([], 0)


def test_answers_to_a_prompt_of_ours_are_checked_by_its_form() -> None:
    boxed = Asked("3", reasoned=False, style="boxed_en")
    texts = ["One and two are three.\n\\boxed{3}", "One and two are four.\n\\boxed{4}", RIGHT]
    assert [judge(text, boxed).verdict for text in texts] == ["right", "wrong", "malformed"]
