"""Is an answer right? One way per kind of source, for preference pairs; `data.prompts[].verifier` chooses it.

| verifier | right is | for sources like |
|---|---|---|
| `exact` | the truth, but for spelling (`minivlm.scoring.answers`) | counts, colours, yes and no |
| `relaxed` | a number within 5 %, years exactly; else as `exact` | ChartQA |
| `anls` | similar to 0.9 (1 - edit distance / length), all digits equal | DocVQA, InfoVQA |
| `choice` | the letter of the true option, however it is written | ScienceQA, M3CoT |
| `numeric` | the value within 0.1 %, the unit equal or left out | geometry, CLEVR-Math |
| `vqa` | equal after the VQA challenge's normalisation | VQAv2, TextVQA |

After MMPR's modes (OpenGVLab/InternVL, tools/reasoning_data_pipeline/utils/accuracy_reward.py), which count what scores
above 0.9; `exact` is enough in each of them. Departures: its ANLS is inverted there (an entirely wrong text counts as
right); digits that differ are wrong however long the text; only years of 20xx were exact; units were dropped.
"""

import math
import re
import unicodedata
from collections.abc import Callable

from minivlm.scoring.answers import is_correct, mentions, normalize
from minivlm.scoring.text_metrics import anls, relaxed_match, vqa_accuracy, vqa_normalize

MIN_SCORE = 0.9
MAX_NUMERIC_CHANGE = 1e-3
NUM_ANNOTATORS = 10
"""A single truth stands for so many equal answers of annotators."""

_EDGE = " \t\r\n.,;:!?。，、；：！？*`\"'“”‘’"
_YEAR = re.compile(r"(?:1[5-9]|20)\d\d")
_OPTION = re.compile(
    r"(?:the\s+)?(?:(?:correct\s+)?(?:answer|option|choice)\s+(?:is\s+)?|选项\s*|选\s*)?"
    r"(?:\(([a-z])\)|([a-z])(?=$|[.)](?:\s|$)|\s*[:、]))(.*)",
    re.IGNORECASE | re.DOTALL,
)
_OTHER_OPTION = re.compile(
    r"(?:\b(?:or|and|nor)\b|或|和)\W*[a-z]\b|\([a-z]\)"
    r"|(?:^|[.,;:)、。/&\n])\s*[a-h]\s*(?=$|[.,;:)、。/&\n])"  # alone between marks: "A. B. C.", "选A、B", "(A) no, B"
    r"|(?<![\w.])[a-h](?:\s*[:)、]\s*\S|\.\s+\S)",  # leading a text of its own: "A: red B: blue"
    re.IGNORECASE,
)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_QUANTITY = re.compile(
    r"[$€£¥]?\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?)(?:\s*/\s*(\d+(?:\.\d*)?))?\s*([a-zµ°%\\^/]{0,10}[23]?)"
)
_UNITS = {"degrees": "°", "degree": "°", "percent": "%", "\\%": "%", "^\\circ": "°", "\\circ": "°"}
_HEDGE = re.compile(r"\b(?:not|no|nor|neither|or|without|\w+n't)\b|不|没|非|或")
_POLAR = {"yes", "no"}
_NUMBERS = re.compile(r"\d+(?:\.\d+)?")


def verify(answer: str, truth: str, verifier: str) -> bool:
    """Whether a short answer gives the truth, as this kind of source wants it compared.

    Args:
        answer: without reasoning and marker. An empty one is never right.
        verifier: a key of `VERIFIERS`.

    Raises:
        ValueError: an unknown verifier.
    """
    if verifier not in VERIFIERS:
        raise ValueError(f"no verifier `{verifier}`: type one of {', '.join(VERIFIERS)}")
    if not answer.strip():
        return False
    return is_correct(answer, truth) or VERIFIERS[verifier](answer, truth)


def option_letter(text: str) -> str | None:
    """The letter that names an option, in upper case: "A", "(a)", "A. red", "Option A", "选A"; None where none does.

    A text that names a second option ("(A) or (B)", "A、B", "A: red B: blue") names none.
    """
    found = _OPTION.fullmatch(unicodedata.normalize("NFKC", text).strip().strip("*`\"'").strip())
    if found is None or _OTHER_OPTION.search(found[3]):
        return None
    return (found[1] or found[2]).upper()


def fix_answer(text: str, answer: str, truth: str) -> str:
    """The response with its last answer in the truth's own spelling, where the answer says the truth and nothing else.

    "Final answer: **the dog.**" becomes "Final answer: dog": the form is learned together with the content, and
    emphasis in the last line goes. Departures from MMPR: whole words count (1 is not in 10), an answer that denies or
    offers others ("not red", "3 or 4") stays as it is, and this says nothing about right or wrong: it is for responses
    that `verify` found right, while there whatever contains the truth becomes right.

    Args:
        text: the whole response, a right one, which ends in `answer`.
        answer: its final answer, as `extract_answer` finds it.
        truth: the known answer.
    """
    if not _says(answer, truth):
        return text
    head, found, tail = text.rpartition(answer)
    if not found:
        return text
    above, line_break, line = (head + truth + tail).strip().rpartition("\n")
    return above + line_break + line.replace("**", "").strip()


def _says(answer: str, truth: str) -> bool:
    letter = option_letter(truth)
    if letter is not None and letter == truth.strip().upper():
        return option_letter(answer) == letter
    given, expected = normalize(answer), normalize(truth)
    if not mentions(answer, truth) or set(_HEDGE.findall(given)) - set(_HEDGE.findall(expected)):
        return False
    if expected in _POLAR:
        return _POLAR.intersection(re.findall(r"\w+", given)) == {expected}
    return _NUMBERS.findall(given) == _NUMBERS.findall(expected)


def _is_relaxed(answer: str, truth: str) -> bool:
    if _YEAR.fullmatch(truth.strip()):
        return False  # as text, which `verify` has compared
    return relaxed_match(answer.strip(_EDGE).replace(",", ""), truth.strip(_EDGE).replace(",", ""))


def _is_similar(answer: str, truth: str) -> bool:
    digits = [[char for char in text if char.isdigit()] for text in (answer, truth)]
    return digits[0] == digits[1] and anls(answer, [truth]) >= MIN_SCORE


def _is_choice(answer: str, truth: str) -> bool:
    letter = option_letter(truth)
    return letter is not None and option_letter(answer) == letter


def _is_near(answer: str, truth: str) -> bool:
    given, expected = _quantity(answer), _quantity(truth)
    if given is None or expected is None or (given[1] and expected[1] and given[1] != expected[1]):
        return False
    return abs(given[0] - expected[0]) <= MAX_NUMERIC_CHANGE * abs(expected[0])


def _is_vqa(answer: str, truth: str) -> bool:
    if not vqa_normalize(answer) or not vqa_normalize(truth):
        return False
    return vqa_accuracy(answer, [truth] * NUM_ANNOTATORS) > MIN_SCORE


def _quantity(text: str) -> tuple[float, str] | None:
    """Value and unit of "$1,200", "3.50 cm", "45°", "1/2" or "\\frac{1}{2}"; None where the text is something else
    or a number too large to be held."""
    text = _FRACTION.sub(r"\1/\2", unicodedata.normalize("NFKC", text).casefold().strip(_EDGE + "$"))
    found = _QUANTITY.fullmatch(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))
    if found is None:
        return None
    divisor = float(found[2] or 1)
    if divisor == 0:
        return None
    value, unit = float(found[1]), found[3].strip(_EDGE)
    if not (math.isfinite(value) and math.isfinite(divisor) and math.isfinite(value / divisor)):
        return None
    return value / divisor, _UNITS.get(unit, unit)


VERIFIERS: dict[str, Callable[[str, str], bool]] = {
    "exact": is_correct,
    "relaxed": _is_relaxed,
    "anls": _is_similar,
    "choice": _is_choice,
    "numeric": _is_near,
    "vqa": _is_vqa,
}
