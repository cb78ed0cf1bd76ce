"""Wrapping questions into prompts, stripping what they end in, and reading responses with the checks of each style."""

import pytest

from minivlm.data.miniworld.reasoning import PROMPT
from minivlm.scoring.prompts import (
    SHORT_ANSWER,
    SHORT_INSTRUCTIONS,
    STYLES,
    Parsed,
    cot_prompt,
    direct_prompt,
    parse_response,
    strip_instruction,
)

ASK = "<image>\nHow many shapes are there?"
CHINESE = "红色的图形有两个，蓝色的图形有一个。"
LONG = "There are two red ones and one that is blue."


@pytest.mark.parametrize(
    "ending", [*SHORT_INSTRUCTIONS, PROMPT, "Please think step by step.", "请逐步推理，然后回答。"]
)
@pytest.mark.parametrize("between", ["\n", " "])
def test_what_a_question_asks_for_at_its_end_is_stripped(ending: str, between: str) -> None:
    assert strip_instruction(f"{ASK}{between}{ending}") == ASK


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("question", [ASK, "Two plus two?", "<image>\n<image>\nIs it larger in <image> {question}?"])
def test_a_prompt_holds_the_bare_question_once_and_strips_back_to_it(question: str, style: str) -> None:
    wrapped = cot_prompt(f"{question}\n{SHORT_ANSWER['en']}", style)
    bare = question.replace("<image>\n", "")
    assert wrapped.count(bare) == 1
    assert SHORT_ANSWER["en"] not in wrapped
    assert wrapped.startswith("<image>\n" * question.count("<image>\n"))
    assert wrapped.count("<image>") == question.count("<image>")
    assert strip_instruction(wrapped) == question
    assert cot_prompt(wrapped, "en") == cot_prompt(question, "en")


def test_the_english_prompt_is_worded_as_in_mmpr() -> None:
    assert cot_prompt("<image>\nWhy?", "en") == (
        "<image>\nYour task is to answer the question below. Give step by step reasoning before you answer, and when "
        'you\'re ready to answer, please use the format "Final answer: .."\n\nQuestion:\n\nWhy?'
    )


def test_a_direct_prompt_asks_for_a_short_answer_and_keeps_the_questions_own_request() -> None:
    assert direct_prompt(f"{ASK} {PROMPT}", "en") == f"{ASK}\nAnswer the question using a single word or phrase."
    assert direct_prompt("<image>\n几个？", "zh") == f"<image>\n几个？\n{SHORT_ANSWER['zh']}"
    own = f"{ASK}\nAnswer with the option's letter from the given choices directly."
    assert direct_prompt(own, "en") == own


@pytest.mark.parametrize(
    ("style", "text", "expected"),
    [
        ("en", "Two.\nOne.\nFinal answer: 3", Parsed("Two.\nOne.", "3")),
        ("en", "Two.\n\n**Final Answer:** 3**", Parsed("Two.", "3")),
        ("en", "Two.\nThe final answer: soon\nFinal answer: 3", Parsed("Two.\nThe final answer: soon", "3")),
        ("zh", "两个。\n一个。\n答案：3", Parsed("两个。\n一个。", "3")),
        ("zh", "Two.\nOne.\nFinal answer: 3", Parsed("Two.\nOne.", "3")),
        ("boxed_en", f"{LONG}\nAnswer: \\boxed{{3}}", Parsed(LONG, "3")),
        ("boxed_en", f"{LONG}\nAnswer: $\\boxed{{\\frac{{1}}{{2}}}}$", Parsed(LONG, "\\frac{1}{2}")),
        ("boxed_en", f"{LONG}\nAnswer: \\boxed{{\\text{{dog}}}}", Parsed(LONG, "dog")),
        ("boxed_en", f"{LONG}\nAnswer: \\boxed{{5\\,\\mathrm{{cm}}}}", Parsed(LONG, "5\\,cm")),
        ("boxed_en", f"{LONG}\nAnswer: \\boxed{{\\textbf{{\\text{{A}}}}}}", Parsed(LONG, "A")),
        ("boxed_zh", f"{CHINESE}\n答案：\\boxed{{3}}", Parsed(CHINESE, "3")),
        ("think_en", f"<think>{LONG}</think>\nSo it is \\boxed{{3}}.", Parsed(LONG, "3")),
        ("think_en", f"<think>{LONG} \\boxed{{4}}</think>\n\\boxed{{3}}", Parsed(f"{LONG} \\boxed{{4}}", "3")),
    ],
)  # fmt: skip
def test_responses_in_the_asked_form(style: str, text: str, expected: Parsed) -> None:
    assert parse_response(text, style) == expected


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("en", ""),
        ("en", "Two.\nOne.\nIt is 3."),
        ("en", "Two and one. Final answer: 3"),  # one line: no steps
        ("en", "\n\n\nFinal answer: 3"),  # no rationale
        ("en", "Two.\nOne.\nFinal answer: 3\nor 4"),
        ("en", "Two.\nOne.\nFinal answer:"),
        ("en", "Final answer: 1\nFinal answer: 2\nFinal answer: 3"),
        ("boxed_en", f"{LONG}\nAnswer: 3"),
        ("boxed_en", f"{LONG}\nAnswer: \\boxed{{3"),
        ("boxed_en", f"{LONG}\nAnswer: \\boxed{{ }}"),
        ("boxed_en", f"{LONG}\nAnswer: \\boxed{{\\text{{}}}}"),
        ("boxed_en", "So: \\boxed{3}"),  # too short
        ("think_en", f"{LONG}\n\\boxed{{3}}"),
        ("think_en", f"<think>{LONG}</think>\n3"),
        ("think_en", f"<think>{LONG} \\boxed{{3}}</think>"),  # the box must follow the thoughts
        ("think_en", f"<think>{LONG}</think><think>{LONG}</think>\\boxed{{3}}"),
        ("think_en", f"</think>{LONG}<think>\\boxed{{3}}"),
        ("think_en", "<think>Three.</think>\\boxed{3}"),
        ("think_en", f"Well <think>{LONG}</think>\\boxed{{3}}"),
    ],
)
def test_broken_forms(style: str, text: str) -> None:
    assert parse_response(text, style) is None


def test_unknown_styles_are_named() -> None:
    with pytest.raises(ValueError, match=r"`fr`.*boxed_en"):
        cot_prompt(ASK, "fr")
    with pytest.raises(ValueError, match="`fr`"):
        parse_response(LONG, "fr")
