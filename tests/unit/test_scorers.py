"""Yes/no figures, MME's pairs, and the way from questions through the table of scorers to the figures of a task."""

import pytest

from minivlm.evaluation.summary import Reply, score_question, summarize, to_json
from minivlm.evaluation.tasks import Question
from minivlm.schema import Message
from minivlm.scoring.yes_no import (
    mme_figures,
    says,
    says_at_first,
    says_loosely,
    says_strictly,
    yes_no_figures,
    yes_or_no,
)


def test_yes_no_figures_by_hand() -> None:
    said = [True, True, True, False, False, None]
    truths = [True, True, False, False, True, True]
    figures = yes_no_figures(said, truths)
    assert figures["accuracy"] == 3 / 6
    assert figures["precision"] == 2 / 3  # of three called yes
    assert figures["recall"] == 2 / 4  # the unclear one is missed
    assert figures["f1"] == pytest.approx(4 / 7)  # 2 x 2 / (3 + 4)
    assert (figures["yes_ratio"], figures["unclear"]) == (3 / 6, 1 / 6)


def test_always_yes_has_a_high_f1_which_accuracy_and_yes_ratio_unmask() -> None:
    figures = yes_no_figures([True] * 10, [True] * 5 + [False] * 5)
    assert figures["f1"] == pytest.approx(2 / 3)
    assert (figures["accuracy"], figures["yes_ratio"]) == (0.5, 1.0)


def test_never_yes_divides_by_nothing() -> None:
    assert yes_no_figures([False, None], [True, True])["f1"] == 0


@pytest.mark.parametrize(
    ("answer", "strict", "loose", "first"),
    [
        ("Yes", True, True, True),
        ("no", False, False, False),
        ("Yes.", None, True, True),
        ("No, there is not.", None, False, False),
        ("There is no dog. Yes.", None, False, None),  # only the first sentence; "ther"
        ("NO", False, True, False),  # loosely only "No" and "no" count
        ("", None, True, None),  # loosely nothing is yes
        ("y", None, True, True),
        ("I know", None, True, None),  # "i kn"
        ("Nothing", None, True, False),  # "noth"
    ],
)
def test_four_readings_of_an_answer(answer: str, strict: bool | None, loose: bool, first: bool | None) -> None:
    assert (says_strictly(answer), says_loosely(answer), says_at_first(answer)) == (strict, loose, first)


def test_chinese_truths_are_yes_and_no_too() -> None:
    assert [yes_or_no(word) for word in ("Yes", "no", "有", "没有", "红色")] == [True, False, True, False, None]
    assert [says(answer, "没有") for answer in ("有", "没有", "红色")] == [True, False, None]


def test_mme_counts_pictures_with_both_right() -> None:
    groups = ["color/a", "color/a", "color/b", "color/b", "count/c", "count/c", "code_reasoning/d"]
    figures = mme_figures([1, 1, 1, 0, 0, 0, 1], groups)
    # color: ((1 + 1) + (0.5 + 0)) / 2 x 100 = 125, count: 0
    assert figures == {"accuracy_plus": 1 / 3, "perception": 125.0, "unpaired": 1.0}


def test_mme_counts_a_category_it_does_not_know_as_cognition() -> None:
    groups = ["color/a", "color/a", "handwriting/b", "handwriting/b"]
    assert mme_figures([1, 1, 1, 0], groups) == {
        "accuracy_plus": 1 / 2, "perception": 200.0, "cognition": 50.0, "unpaired": 0.0,
    }  # fmt: skip


def question(number: int, task: str, truth: str, **fields: object) -> Question:
    messages = (Message("user", "<image>\nWhat?"),)
    return Question(f"q{number}", task, "en", ("/a.png",), (f"{number:064}",), messages, truth, truth, **fields)


def judged(asked: Question, answer: str):
    return score_question(asked, Reply(answer, (1, 2)), {}, encode=lambda text: [1, 3], max_new_tokens=8)


def test_any_of_the_accepted_answers_is_right() -> None:
    row = judged(question(0, "colour", "grey", truths=("grey", "gray")), "Gray")
    assert (row.score, row.truth, row.truths, row.scorer) == (1.0, "grey", ("grey", "gray"), "short_answer")


def test_a_yes_no_task_has_its_figures_and_others_have_none() -> None:
    rows = [judged(question(i, "existence", truth), "yes") for i, truth in enumerate(("yes", "no"))]
    tasks = summarize([*rows, judged(question(2, "colour", "red"), "yes")], {})["tasks"]
    assert tasks["existence"]["metrics"]["yes_ratio"] == 1.0
    assert tasks["existence"]["metrics"]["f1"] == pytest.approx(2 / 3)
    assert tasks["colour"]["metrics"] == {}


def test_captions_are_scored_by_tokens() -> None:
    row = judged(question(0, "caption", "a b", scorer="caption_tokens"), "a c")
    assert (row.score, row.metrics, row.token_f1) == (0.5, {"token_f1": 0.5}, 0.5)
    assert to_json(row)["metrics"] == {"token_f1": 0.5}
    assert summarize([row], {})["caption"]["measure"] == "token_accuracy"


def test_captions_of_the_miniworld_show_hallucinated_objects() -> None:
    truth = "a1 small red ring, b2 large blue cross"
    answers = ["a1 small red ring, b2 large green cross, c3 small red ring", "nothing"]
    rows = [judged(question(i, "caption", truth, scorer="caption_tokens"), text) for i, text in enumerate(answers)]
    metrics = summarize(rows, {})["caption"]["metrics"]
    # three mentions, the green cross is not there; one of two captions; one of four objects named
    assert metrics == {"chair_i": 1 / 3, "chair_s": 1 / 2, "chair_recall": 1 / 4}


def test_coco_captions_have_figures_of_the_whole_set() -> None:
    truths = {"a dog on a bench": ("a dog sits on a bench", "dog"), "a cat": ("a cat sleeps on a red couch",)}
    rows = [
        judged(question(i, "coco_captions", refs[0], truths=refs, scorer="captions"), text)
        for i, (text, refs) in enumerate(truths.items())
    ]
    figures = summarize(rows, {})["tasks"]["coco_captions"]
    assert figures["measure"] == "rouge_l"
    assert set(figures["metrics"]) == {"cider", "bleu_4", "chair_i", "chair_s", "chair_recall"}
    assert (figures["metrics"]["chair_i"], figures["metrics"]["chair_recall"]) == (0.0, 3 / 4)
