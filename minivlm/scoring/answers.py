"""From the text that a model wrote to right or wrong: find the final answer, normalise it, compare with the truth.

Used by evaluation and by the preference verifier, so both mean the same by "right". Pure text functions.
"""

import math
import re
import unicodedata

MARKER = re.compile(r"(?:final\s+answer|答案)\s*[:：]", re.IGNORECASE)
"""What stands before the answer at the end of a chain of thought (MMPR's own format)."""

_NUMBER_WORDS = {
    word: str(value)
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
    )
}
_CHINESE_DIGITS = {char: value for value, char in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_CHINESE_WORDS = {"是的": "是", "不是": "否", "对": "是", "不对": "否"}
_EDGE = " \t\r\n.,;:!?。，、；：！？()[]{}\"'`*$“”‘’「」"
_ARTICLE = re.compile(r"^(?:a|an|the)\s+(?=\w)")
_BARE_POINT = re.compile(r"(?<![\w.])\.(?=\d)")
_COUNT_WITH_CLASSIFIER = re.compile(r"^(\d{1,40}|[零〇一二两三四五六七八九十]{1,3})[个只块张]?$")
_POLAR = {"yes", "no"}


def extract_answer(text: str) -> str | None:
    """The answer after the *last* `Final answer:` or `答案:`, on that line or, if it is bare, on the next one.

    Returns:
        The answer without surrounding blanks and emphasis marks; None if there is no marker or nothing after it.
    """
    return text_after_last(MARKER, text, blanks=" \t*`")


def text_after_last(marker: re.Pattern[str], text: str, *, blanks: str) -> str | None:
    """The first line behind the last `marker` that is more than `blanks`, without them; None if there is none."""
    matches = list(marker.finditer(text))
    lines = text[matches[-1].end() :].splitlines() if matches else []
    return next((answer for line in lines if (answer := line.strip(blanks))), None)


def normalize(text: str) -> str:
    """Spelling that does not matter removed: width and case, edge punctuation, a leading article, number words.

    "**The Red circle.**" -> "red circle", "Three" -> "3", "３" -> "3", "三个" -> "3", "1,000" -> "1000", "(A)" -> "a",
    ".5" -> "0.5".
    """
    text = _BARE_POINT.sub("0.", unicodedata.normalize("NFKC", text).casefold()).strip(_EDGE)
    text = _ARTICLE.sub("", re.sub(r"\s+", " ", text))
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = " ".join(_NUMBER_WORDS.get(word, word) for word in text.split(" "))
    text = _CHINESE_WORDS.get(text, text)
    counted = _COUNT_WITH_CLASSIFIER.match(text)
    return str(_count(counted.group(1))) if counted else text


def is_correct(answer_text: str, truth: str) -> bool:
    """Whether a model's whole text gives the truth.

    With a marker, only what follows the last one counts (a marker with nothing behind it is wrong). Without one the
    whole text is the answer. Numbers compare by value; a yes/no truth also accepts a sentence that starts with that
    word and does not contain the other one. An empty text is never right.
    """
    answer = extract_answer(answer_text)
    if answer is None:
        if MARKER.search(answer_text):
            return False
        answer = answer_text
    expected = normalize(truth) or truth.strip()
    given = normalize(answer) or answer.strip()
    if not given:
        return False
    if given == expected:
        return True
    if expected in _POLAR:
        words = re.findall(r"\w+", given)
        return words[:1] == [expected] and len(_POLAR & set(words)) == 1
    left, right = _number(given), _number(expected)
    return left is not None and right is not None and math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-12)


def mentions(answer: str, truth: str) -> bool:
    """Whether an answer contains the truth ("dog" in "a dog and a cat"), both normalised.

    Latin words and numbers must occur as a whole (1 is not in 10, nor 2 in 2.5, nor 5 in -5), Chinese as a substring.
    """
    inner, outer = normalize(truth), normalize(answer)
    if not inner:
        return False
    start = r"(?<![a-z0-9.])" if re.match(r"[a-z0-9]", inner) else ""
    if inner[0].isdecimal():
        start += r"(?<!(?<!\w)[-−])"  # a minus sign; in "3-5" it is a dash
    end = r"(?![a-z0-9]|\.\d)" if re.search(r"[a-z0-9]$", inner) else ""
    return re.search(start + re.escape(inner) + end, outer) is not None


def _number(text: str) -> float | None:
    if not re.fullmatch(r"[+-]?(?:\d+\.?\d*|\.\d+)", text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None  # all numbers of 400 digits are infinite, and not the same


def _count(text: str) -> int:
    """Value of ASCII digits or of a Chinese numeral up to 99 (十 = 10, 十二 = 12, 二十三 = 23)."""
    if text.isdigit():
        return int(text)
    if "十" not in text:
        return int("".join(str(_CHINESE_DIGITS[char]) for char in text))
    tens, _, ones = text.partition("十")
    high = _CHINESE_DIGITS.get(tens, 1)
    return 10 * high + _CHINESE_DIGITS.get(ones, 0)
