"""Answers of benchmarks out of free text: the final answer, an option's letter, a number. Pure; never raises.

Rules in fixed order, each linear in the text. What none of them finds is None: nothing is guessed (MMMU's scorer draws
a random option there) and no judge model is asked (as MathVista's does).
"""

import re
import string
from collections.abc import Sequence

from minivlm.scoring.answers import is_correct, normalize, text_after_last

LETTERS = string.ascii_uppercase
MAX_CHARS = 20_000
"""Only so much of the end of an answer is read."""

_MARKER = re.compile(r"(?:final answer|answer|答案)\s{0,9}[:：]|the answer is\b", re.IGNORECASE)
_BOXED = "\\boxed{"
_ALONE = re.compile(r"[(\[]?([A-Z])[)\].:,]*")
_LEADING = re.compile(r"(?i:option|choice|answer)?\s{0,9}[:：]?\s{0,9}[(\[]?([A-Z](?=[)\].:])|[a-z](?=\)))")
_NAMED = re.compile(r"(?i:\b(?:option|choice|answer is)\s{1,9}|选项\s{0,9})([A-Z])(?![A-Za-z0-9_])")
_REASONED = re.compile(r"[(\[]?([A-Z])[)\]]?[,;，；]?\s{0,9}(?i:since|because|因为)")
_CHOSEN = re.compile(r"(?:选择?|答案[是为])\s{0,9}[:：]?\s{0,9}[(（]?([A-Z])(?![A-Za-z0-9])")
_BRACKETED = re.compile(r"\(([A-Z])\)")
_STANDING = re.compile(r"(?<![\w'’])([A-Z])(?![\w'’])")
_DENIED = re.compile(
    r"(?:\b(?i:not|cannot|neither|nor|instead\s{1,9}of|rather\s{1,9}than)|n['’]t)(?:\s{1,9}be)?\s{1,9}"
    r"(?i:(?:the\s{1,9})?(?:option|choice|answer)\s{1,9})?[(\[]?[A-Z](?!\w)[)\]]?"
    r"|(?:不是|不选择?|排除|并非)\s{0,9}(?:选项)?\s{0,9}[(（]?[A-Z](?![A-Za-z0-9])[)）]?"
)
"""An option that is turned down: "not A", "rather than (A)", "不选A"."""
_WRONG = re.compile(
    r"(?:(?i:option|choice)\s{1,9})?[(\[]?(?<![\w'’])[A-Z](?!\w)[)\]]?\s{1,9}(?i:is|was|seems|would\s{1,9}be)"
    r"(?i:\s{1,9}(?:wrong|incorrect|false)|(?:n['’]t|\s{1,9}not)\s{1,9}(?:the\s{1,9})?(?:correct|right|true|answer))\b"
    r"|(?:选项)?\s{0,9}(?<![A-Za-z0-9])[A-Z]\s{0,9}(?:选项|项)?是?(?:错误|不正确|不对|错)"
)
"""An option that is called wrong, which is a "Which is wrong?" question's answer where no other one is named."""
_NUMBER = re.compile(r"(?<![\d.,^])(?<!\^\{)(?<!\^[-+−])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d{1,40})(?:\.\d{1,40})?")
_OUT_OF = re.compile(r"(?<=\d)\s{1,9}out\s{1,9}of\s{1,9}\d[\d,.]{0,40}")


def final_answer(text: str) -> str | None:
    """What stands in the last `\\boxed{..}`, or else behind the last "Final answer:", "Answer:", "答案:" or "The answer
    is", on its line or the next one that is not blank; None without any, and where nothing follows."""
    text = text[-MAX_CHARS:]
    start = text.rfind(_BOXED)
    if start >= 0:
        inside = _balanced(text, start + len(_BOXED))
        if inside is not None and inside.strip():
            return inside.strip()
    return text_after_last(_MARKER, text, blanks=" \t*`:：")


def choice_letter(text: str, choices: Sequence[str]) -> str | None:
    """Letter of the option that an answer to a multiple choice names; None where it names none.

    In this order, on the final answer where there is one: a letter alone, or on the first or last line; a letter with
    its mark at the start ("B.", "(B) ..", "The answer is B:") or a reason ("B, since .."); "选B"; "option B"; the last
    "(B)"; a text equal to an option's; the last capital that stands alone (an "A" before a small letter is an article);
    the only option whose text occurs. Letters that are turned down ("not A") do not count, nor such as are called wrong
    ("option A is incorrect") where another one is left.
    """
    letters = LETTERS[: len(choices)]
    given = (final_answer(text) or text[-MAX_CHARS:]).strip(" \t\r\n*`$\"'")
    left = _without_rejected(given, letters)
    found = _by_letter(left, letters)
    if found is not None:
        return found
    wanted = normalize(given)
    names = [normalize(choice) for choice in choices]
    equal = [letter for letter, name in zip(letters, names, strict=False) if name and name == wanted]
    if len(equal) == 1:
        return equal[0]
    standing = _last_standing(left, letters)
    if standing is not None:
        return standing
    inside = [letter for letter, name in zip(letters, names, strict=False) if name and _occurs(name, wanted)]
    return inside[0] if len(inside) == 1 else None


def last_number(text: str) -> float | None:
    """The last number of a text: "about 1,250.5 kg" -> 1250.5; None without any. No exponent ("12 cm^2" -> 12), and
    not the whole of a part ("5 out of 10" -> 5)."""
    numbers = _NUMBER.findall(_OUT_OF.sub("", text[-MAX_CHARS:]))
    return float(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None


def is_math_answer(text: str, truth: str, choices: Sequence[str] = ()) -> bool:
    """Whether an answer gives the truth of a MathVista question.

    With choices the option named must be the truth's text. A number is compared after rounding to the decimals of the
    truth ("1.50" for "1.5"; "3.7" is not "3", which the reference would cut to 3). Lists and texts by `is_correct`.

    Source: Lu et al. 2024, arXiv:2310.02255, App. B; the reference asks a language model to extract, these are rules.
    """
    if choices:
        letter = choice_letter(text, choices)
        return letter is not None and choices[LETTERS.index(letter)] == truth
    given = final_answer(text) or text[-MAX_CHARS:].strip()
    if re.fullmatch(r"[+-]?\d{1,40}(?:\.\d{1,40})?", truth):
        number = last_number(given)
        decimals = len(truth.partition(".")[2])
        return number is not None and round(number, decimals) == float(truth)
    return is_correct("".join(given.split()) if truth.startswith("[") else given, truth.replace(" ", "")) or is_correct(
        given, truth
    )


def contains_answer(text: str, truths: Sequence[str]) -> bool:
    """Whether any truth occurs in the answer, whatever the case (OCRBench; lmms-eval tasks/ocrbench/utils.py)."""
    given = text.lower().strip().replace("\n", " ")
    return any(truth.lower().strip().replace("\n", " ") in given for truth in truths)


def contains_formula(text: str, truths: Sequence[str]) -> bool:
    """As `contains_answer` without any blanks, with case (OCRBench's HME100k).

    The reference writes the answer small but not the truth, so that a formula with a capital is never right there.
    """
    given = "".join(text.split())
    return any("".join(truth.split()) in given for truth in truths)


def is_exact(text: str, truths: Sequence[str]) -> bool:
    """Equal to a truth but for case and surrounding blanks."""
    return text.strip().casefold() in {truth.strip().casefold() for truth in truths}


def starts_with_letter(text: str, letter: str) -> bool:
    """MMStar's own rule: the answer starts with the letter, "(", "option " or "the answer is " before it at most, also
    where a word goes on from there (lmms-eval tasks/mmstar/utils.py)."""
    given = text.lower().strip().replace("\n", " ")
    return any(given.startswith(start + letter.lower()) for start in ("", "(", "option ", "the answer is "))


def is_letter(text: str, letter: str) -> bool:
    """ScienceQA's own rule: the letter alone, or at the start with a full stop (lmms-eval tasks/scienceqa/utils.py)."""
    return text == letter or text.startswith(f"{letter}.")


def _by_letter(given: str, letters: str) -> str | None:
    alone = re.fullmatch(r"[a-z]", given)
    if alone and given.upper() in letters:
        return given.upper()
    lines = [line.strip(" \t\r*`") for line in (given.split("\n", 1)[0], given.rsplit("\n", 1)[-1])]
    alone_on_a_line = (_ALONE.fullmatch(line) for line in lines)
    marked = (_LEADING.match(given), _REASONED.match(given), _CHOSEN.search(given), _NAMED.search(given))
    for match in (*alone_on_a_line, *marked):
        if match and match[1].upper() in letters:
            return match[1].upper()
    bracketed = [letter for letter in _BRACKETED.findall(given) if letter in letters]
    return bracketed[-1] if bracketed else None


def _without_rejected(given: str, letters: str) -> str:
    """The text without what is turned down, and without what is called wrong if a letter is left then."""
    kept = _DENIED.sub(" ", given).strip()
    left = _WRONG.sub(" ", kept).strip()
    return kept if _by_letter(left, letters) is None and _last_standing(left, letters) is None else left


def _last_standing(given: str, letters: str) -> str | None:
    standing = [match for match in _STANDING.finditer(given) if match[1] in letters and not _is_article(given, match)]
    return standing[-1][1] if standing else None


def _is_article(text: str, match: re.Match[str]) -> bool:
    """An "A" or "I" with a word behind it."""
    return match[1] in "AI" and re.match(r"\s+\w", text[match.end() : match.end() + 9]) is not None


def _occurs(name: str, text: str) -> bool:
    """As whole words: "cat" is not in "concatenate"."""
    start = text.find(name)
    while start >= 0:
        end = start + len(name)
        before, after = text[start - 1 : start] if start else "", text[end : end + 1]
        if not (before.isalnum() and name[:1].isascii()) and not (after.isalnum() and name[-1:].isascii()):
            return True
        start = text.find(name, end)
    return False


def _balanced(text: str, start: int) -> str | None:
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None
