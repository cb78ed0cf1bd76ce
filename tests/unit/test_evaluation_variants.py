"""In which ways a question is asked, and which ways do not suit it."""

from dataclasses import replace

import pytest

from minivlm.evaluation.tasks import Question
from minivlm.evaluation.variants import Asked, ask_all, asks_for_steps, vary
from minivlm.schema import Message

STEPS = "Think step by step and end with 'Final answer: ..'."
SHORT = "Answer the question using a single word or phrase."


def question(text: str = "<image>\nHow many?", task: str = "count", language: str = "en") -> Question:
    pictures = tuple(str(number) for number in range(text.count("<image>")))
    return Question("q", task, language, pictures, pictures, (Message("user", text),), "3", "3")


def text_of(way: Asked | str) -> str:
    assert isinstance(way, Asked)
    return way.messages[-1].content


def test_without_pictures_there_is_no_placeholder() -> None:
    turns = (Message("user", "<image>\n<image>\nWhich?"), Message("assistant", "This <image>."), Message("user", "So?"))
    way = vary(replace(question("<image>\n<image>"), messages=turns), "no_image")
    assert isinstance(way, Asked)
    assert [turn.content for turn in way.messages] == ["Which?", "This <image>.", "So?"]
    assert way.image_sha256 == ()
    assert vary(question("How many?"), "no_image") == "shows no picture"


def test_direct_replaces_the_request_for_steps() -> None:
    assert text_of(vary(question(f"<image>\nHow many? {STEPS}"), "direct")) == f"<image>\nHow many?\n{SHORT}"


@pytest.mark.parametrize("text", ["<image>\nHow many?", "<image>How many?", f"<image>\nHow many?\n{SHORT}"])
def test_what_asks_for_no_steps_is_direct_already(text: str) -> None:
    assert vary(question(text), "direct") == "asks for no chain of thought"


def test_cot_wraps_in_the_questions_language() -> None:
    assert asks_for_steps(text_of(vary(question(), "cot")))
    assert text_of(vary(question(f"<image>\nHow many?\n{SHORT}"), "cot")).endswith("Question:\n\nHow many?")
    assert "请先逐步推理" in text_of(vary(question("<image>\n有几个？", language="zh"), "cot"))


def test_cot_suits_neither_captions_nor_what_carries_it() -> None:
    assert vary(question(task="caption"), "cot") == "a caption has no final answer"
    assert vary(question(f"<image>\nHow many? {STEPS}"), "cot") == "asks for a chain of thought already"


@pytest.mark.parametrize("variant", ["direct", "cot"])
def test_rewording_keeps_the_pictures_and_earlier_turns(variant: str) -> None:
    text = f"How many? {STEPS}" if variant == "direct" else "How many?"
    turns = (Message("user", "<image>\nWhat?"), Message("assistant", "A cat."), Message("user", text))
    way = vary(replace(question("<image>"), messages=turns), variant)
    assert isinstance(way, Asked)
    assert (way.messages[:2], way.image_sha256) == (turns[:2], ("0",))


def test_what_a_variant_leaves_out_is_counted_with_the_reason() -> None:
    asked = [question(), question(task="caption"), question(f"<image>\nHow many? {STEPS}", task="reasoning")]
    found = ask_all(asked, ["direct", "cot", "cot"])
    assert list(found.asked["real"]) == [0, 1, 2]
    assert (list(found.asked["direct"]), list(found.asked["cot"])) == ([2], [0])
    reason = "asks for no chain of thought"
    assert found.skipped["direct"] == {"caption": {reason: 1}, "count": {reason: 1}}
