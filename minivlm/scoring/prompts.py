r"""Prompts that ask for a chain of thought or for a short answer, and the reading of what a model wrote to them.

| style | asks for | a response has the form |
|---|---|---|
| `en`, `zh` | reasoning, then `Final answer: ..` (`答案: ..`) | a rationale, two line breaks, one or two markers |
| `boxed_en`, `boxed_zh` | reasoning, then `Answer: \boxed{..}` | a closed box, more than 20 characters in all |
| `think_en`, `think_zh` | `<think>..</think>`, then `\boxed{..}` | one block of more than 20 characters, then a box |

These are MMPR's own (`en`, `en_v2`, `en_r1` and their Chinese forms in OpenGVLab/InternVL,
tools/reasoning_data_pipeline); `en` is worded as there, the others ask for the same form in words of our own. Used by
the preference stage and by evaluation's `cot` and `direct` variants. Pure text functions.
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from minivlm.schema import IMAGE_PLACEHOLDER
from minivlm.scoring.answers import MARKER

Style = Literal["en", "zh", "boxed_en", "boxed_zh", "think_en", "think_zh"]
STYLES: tuple[Style, ...] = get_args(Style)

SHORT_ANSWER = {"en": "Answer the question using a single word or phrase.", "zh": "请直接用一个词或短语回答问题。"}
"""What a direct prompt ends in, by language."""

SHORT_INSTRUCTIONS = (
    *SHORT_ANSWER.values(),
    "Answer with the option's letter from the given choices directly.",
    "Answer with the option letter from the given choices directly.",
    "Please answer Yes or No.",
    "请直接回答选项字母。",
    "请回答是或否。",
)
"""Requests for a short answer at the end of a question; a chain of thought would contradict them."""

MIN_CHARACTERS = 20
"""A boxed response, or a block of thoughts, needs more than so many: less is no reasoning."""

MAX_INSTRUCTIONS = 8
"""So many requests at the end of a question are stripped: a hostile row may hold thousands."""

_TEMPLATES: dict[Style, str] = {
    "en": (
        "Your task is to answer the question below. Give step by step reasoning before you answer, and when you're "
        'ready to answer, please use the format "Final answer: .."\n\nQuestion:\n\n{question}'
    ),
    "zh": '你的任务是回答下面的问题。请先逐步推理，准备好回答时，请使用格式 "答案: ..."\n\n问题:\n\n{question}',
    "boxed_en": (
        "{question}\nAnswer this question. Reason step by step from what is given, without repeating yourself; if you "
        "are not sure, decide for the best guess. End with a line of this form: 'Answer: \\boxed{$FINAL_ANSWER}'"
    ),
    "boxed_zh": (
        "{question}\n请回答这个问题。请根据已知信息逐步推理，不要重复；如果不确定，请给出最合理的猜测。"
        "最后一行请使用这个格式：“答案：\\boxed{$FINAL_ANSWER}”"
    ),
    "think_en": (
        "Reason about the question first, between <think> and </think>. Then answer it on a new line, without "
        "pointing back to your thoughts.\n{question}\nPut the final answer within \\boxed{}."
    ),
    "think_zh": (
        "请先在 <think> 和 </think> 之间思考问题，然后另起一行作答，不要提及思考过程。\n"
        "{question}\n请把最终答案放在 \\boxed{} 中。"
    ),
}
_WRAPPED = [tuple(text.split("{question}")) for text in _TEMPLATES.values()]
_STEP_BY_STEP = re.compile(
    r"(?:(?:^|(?<=[\s.?!。？！]))(?:please\s+)?(?:think|reason)\s+step\s+by\s+step\b[^\n]*"
    r"|请?(?:一步一步|逐步)地?(?:思考|推理)[^\n]*)$",
    re.IGNORECASE,
)
_BOX = "\\boxed{"
_FONT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf)\s*\{([^{}]*)\}")
MAX_NESTED_FONTS = 3
"""So many of LaTeX's `\\text{..}` within each other are taken off in a box."""
_LABEL = re.compile(r"(?:final\s+)?answer\s*:\s*$|答案\s*[:：]\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Parsed:
    """A response in the asked form: the reasoning, and the answer without its marker or box."""

    rationale: str
    answer: str


def strip_instruction(question: str) -> str:
    """The bare question: without a request for a short answer, or for steps, at its end, and out of a prompt of ours.

    Pictures' placeholders stay where they are.
    """
    places, text = _split_places(question)
    for _ in range(MAX_INSTRUCTIONS):
        before = text
        for head, tail in _WRAPPED:
            if text.startswith(head) and text.endswith(tail):
                text = text[len(head) : len(text) - len(tail)].strip()
        for instruction in SHORT_INSTRUCTIONS:
            text = text.removesuffix(instruction).strip()
        above, line_break, line = text.rpartition("\n")
        text = (above + line_break + _STEP_BY_STEP.sub("", line)).strip()
        if text == before:
            break
    return places + text


def cot_prompt(question: str, style: Style) -> str:
    """The question wrapped into a request for a chain of thought, placeholders of pictures that led it in front.

    Wrapping twice is wrapping once: `strip_instruction` goes first.

    Raises:
        ValueError: an unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"no prompt style `{style}`: type one of {', '.join(STYLES)}")
    places, text = _split_places(strip_instruction(question))
    return places + _TEMPLATES[style].replace("{question}", text)


def direct_prompt(question: str, language: str) -> str:
    """The question with a request for a short answer: its own where it ends in one, else `SHORT_ANSWER`.

    Args:
        language: `zh`; all others are asked in English.
    """
    if question.rstrip().endswith(SHORT_INSTRUCTIONS):
        return question
    return f"{strip_instruction(question)}\n{SHORT_ANSWER['zh' if language == 'zh' else 'en']}"


def parse_response(text: str, style: Style) -> Parsed | None:
    """Rationale and answer of a response to a prompt of this style; None if the form that it asked for is broken.

    The checks are those of MMPR's pipeline (see the table above). Either language's marker counts, whatever the
    prompt's; an empty answer, or one that goes on behind its line, breaks the form.

    Raises:
        ValueError: an unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"no prompt style `{style}`: type one of {', '.join(STYLES)}")
    text = text.strip()
    if style in ("en", "zh"):
        return _parse_marked(text)
    thoughts = ""
    if style in ("think_en", "think_zh"):
        if text.count("<think>") != 1 or text.count("</think>") != 1:
            return None
        before, _, rest = text.partition("<think>")
        thoughts, closed, text = rest.partition("</think>")
        thoughts = thoughts.strip()
        if before.strip() or not closed or len(thoughts) <= MIN_CHARACTERS:
            return None
    elif len(text) <= MIN_CHARACTERS:
        return None
    boxed = _last_box(text)
    if boxed is None:
        return None
    before, answer = boxed
    rationale = thoughts or _LABEL.sub("", before.strip(" \n*$'\"“")).strip()
    return Parsed(rationale, answer)


def _parse_marked(text: str) -> Parsed | None:
    markers = list(MARKER.finditer(text))
    if not 1 <= len(markers) <= 2 or text.count("\n") < 2:
        return None
    rationale = text[: markers[-1].start()].strip(" \t\n*")
    answer = text[markers[-1].end() :].strip().strip(" \t*`")
    if not rationale or not answer or "\n" in answer:
        return None
    return Parsed(rationale, answer)


def _last_box(text: str) -> tuple[str, str] | None:
    """What stands before the last `\\boxed{..}`, and its content without `\\text{..}` and the like around its words;
    None if it is not closed or empty."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth, first = 1, start + len(_BOX)
    for place in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            answer = text[first:place]
            for _ in range(MAX_NESTED_FONTS):
                answer = _FONT.sub(r"\1", answer)
            answer = answer.strip()
            return (text[:start], answer) if answer else None
    return None


def _split_places(question: str) -> tuple[str, str]:
    """Leading placeholders, one a line, and the text behind them."""
    rest, count = question.strip(), 0
    while rest.startswith(IMAGE_PLACEHOLDER):
        rest, count = rest.removeprefix(IMAGE_PLACEHOLDER).lstrip(), count + 1
    return f"{IMAGE_PLACEHOLDER}\n" * count, rest
