"""Slices: which traits a question has, and figures against what the tasks lead one to expect."""

from typing import Any

import pytest

from minivlm.evaluation.slices import find_slices, traits


def row(task: str, score: float, **changes: Any) -> dict[str, Any]:
    plain = {
        "language": "en",
        "source": "",
        "group": "",
        "images": ["a"],
        "question": "<image>\nWhat?",
        "truth": "cat",
        "scorer": "short_answer",
    }
    return {"task": task, "score": score, "cluster": f"{id(object())}", **plain, **changes}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"question": "How many red or GREY rings?", "truth": "three"}, {("colour", "red"), ("colour", "gray"),
         ("answer", "number 3"), ("word", "rings")}),
        ({"question": "红色的圆有几个？", "truth": "两个", "language": "zh"},
         {("colour", "red"), ("answer", "number 2"), ("language", "zh")}),
        ({"truth": "Yes.", "images": ["a", "b"]}, {("answer", "yes"), ("pictures", "2")}),
        ({"truth": "12.5", "source": "chart", "group": "bar"}, {("answer", "another number"), ("source", "chart"),
         ("group", "bar")}),
    ],
)  # fmt: skip
def test_traits_are_read_off_the_question(changes: dict[str, Any], expected: set[tuple[str, str]]) -> None:
    assert expected <= traits(row("count", 1.0, **changes))


def test_a_colour_inside_of_another_word_is_none() -> None:
    assert not any(name == "colour" for name, _ in traits(row("x", 1.0, question="Is it covered in greenery?")))


def slices_of(rows: list[dict[str, Any]]) -> dict[tuple[str, str], Any]:
    for number, own in enumerate(rows):
        own["cluster"] = str(number)
    return {(found.trait, found.value): found for found in find_slices([rows])}


def test_a_slice_is_compared_with_its_tasks_and_not_with_all() -> None:
    """Chinese questions are all of the hard task, and as good there as English ones: no loss."""
    easy = [row("easy", 1.0) for _ in range(40)]
    hard = [row("hard", float(i % 2), language="zh" if i < 20 else "en") for i in range(40)]
    chinese = slices_of(easy + hard)["language", "zh"]
    assert (chinese.n, chinese.figures[0][0], chinese.difference, chinese.is_worse) == (20, 0.5, 0.0, False)


def test_a_loss_is_marked_where_the_interval_lies_below_what_the_task_leads_one_to_expect() -> None:
    """Blue is always right, red 2 times of 20: 55 % are expected of either."""
    rows = [row("t", 0.0 if i % 2 else 1.0, question="Is it red?" if i % 2 else "Is it blue?") for i in range(40)]
    rows[1]["score"], rows[3]["score"] = 1.0, 1.0
    red = slices_of(rows)["colour", "red"]
    assert (red.expected, red.difference) == pytest.approx((0.55, 0.1 - 0.55))
    assert 0.1 < red.figures[0][2] < 0.55
    assert red.is_worse
    assert not slices_of(rows)["colour", "blue"].is_worse


def test_small_slices_single_values_and_captions_are_left_out() -> None:
    rows = [row("t", 1.0, source="a" if i < 9 else "b") for i in range(30)]
    rows += [row("caption", 0.5, language="zh", scorer="caption_tokens") for _ in range(30)]
    assert {trait for trait in slices_of(rows) if trait[0] != "word"} == {("source", "b")}


def test_every_checkpoint_has_its_figures() -> None:
    last = [row("t", 1.0, source="a" if i % 2 else "b") for i in range(40)]
    first = [own | {"score": 0.0} for own in last]
    assert all([mean for mean, _, _ in found.figures] == [0.0, 1.0] for found in find_slices([first, last]))
