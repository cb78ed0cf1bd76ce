"""The rules that turn one question's sampled answers into chosen/rejected pairs. Pure functions.

After MMPR's correctness pipeline (arXiv:2411.10442, Sec. 3): right answers x wrong answers, and right answers x
answers that break the asked format. Departures: the entailment rule compares whole words (MMPR's plain substring
would drop 1 against 10), format pairs are limited to a share of all pairs, and the verifier alone says what is right
(MMPR's answer fixing makes right whatever contains the truth).
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from minivlm.schema import CORRECTNESS_KIND
from minivlm.scoring.answers import MARKER, extract_answer, mentions
from minivlm.scoring.prompts import Style, parse_response
from minivlm.scoring.verifiers import fix_answer, option_letter, verify

Verdict = Literal["right", "wrong", "malformed"]
FORMAT_PART = 5
"""At most one of so many pairs of questions with a known answer is a format pair."""


@dataclass(frozen=True)
class Asked:
    """What a question asked for, and how its answers are checked.

    `reasoned`: the question itself asks for `Final answer: ..`; `style`: it was wrapped into this prompt, which decides
    instead. `verifier` is one of `minivlm.scoring.verifiers` and alone says what is right; `fixes` then lets right
    answers take the truth's spelling.
    """

    truth: str
    reasoned: bool
    style: Style | None = None
    verifier: str = "exact"
    fixes: bool = False


@dataclass(frozen=True)
class Judged:
    """One sampled answer: its verdict, its text as a pair would hold it, and the short answer ("" if malformed)."""

    verdict: Verdict
    text: str
    answer: str = ""


@dataclass(frozen=True)
class Choice:
    """One chosen/rejected pair of a question; `kind` is "correctness" or "format"."""

    chosen: str
    rejected: str
    kind: str


@dataclass
class QuestionPairs:
    """Pairs of one question, and why others were not made. `is_unsolved`: no answer was right."""

    pairs: list[Choice] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    is_unsolved: bool = False


def is_well_formed(text: str, *, reasoned: bool) -> bool:
    """Whether an answer has the form that a question of no prompt style asks for.

    Args:
        text: the answer.
        reasoned: True = reasoning, then exactly one `Final answer: ..` or `答案: ..` on the last line.
            False = a direct answer: something, and no such marker.
    """
    text = text.strip()
    markers = list(MARKER.finditer(text))
    if not reasoned:
        return bool(text) and not markers
    if len(markers) != 1 or "\n" in text[markers[0].end() :]:
        return False
    return bool(text[: markers[0].start()].strip(" \n*")) and extract_answer(text) is not None


def judge(text: str, asked: Asked) -> Judged:
    """ "malformed" if the form is broken, else "right" or "wrong" by the question's verifier alone.

    `fixes` changes how a right answer is written, never the verdict. Departure from MMPR, whose fixing comes first and
    makes right whatever contains the truth ("red and blue" for red).
    """
    text = text.strip()
    if asked.style is not None:
        parsed = parse_response(text, asked.style)
        answer = parsed.answer if parsed else None
    elif is_well_formed(text, reasoned=asked.reasoned):
        answer = extract_answer(text) if asked.reasoned else text
    else:
        answer = None
    if answer is None:
        return Judged("malformed", text)
    ends_in_marker = asked.style in ("en", "zh") if asked.style else asked.reasoned
    right = verify(answer, asked.truth, asked.verifier)
    if right and asked.fixes and ends_in_marker and (fixed := fix_answer(text, answer, asked.truth)) != text:
        return Judged("right", fixed, asked.truth)
    return Judged("right" if right else "wrong", text, answer)


def entails(chosen: str, rejected: str) -> bool:
    """Whether the rejected answer contains the chosen one ("dog" in "a dog and a cat"): then it is not clearly wrong.

    Of texts with a marker, what follows the last one is compared. Where both name an option, the letters are ("B. a
    dog" does not contain A); else see `minivlm.scoring.answers.mentions`.
    """
    inner, outer = extract_answer(chosen) or chosen, extract_answer(rejected) or rejected
    letters = option_letter(inner), option_letter(outer)
    if all(letters):
        return letters[0] == letters[1]
    return mentions(outer, inner)


def choose_pairs(
    answers: Sequence[str | None], asked: Asked, *, max_pairs: int, max_format_pairs: int = 1, seed: str
) -> QuestionPairs:
    """Pairs of one question: right x wrong first, then right x malformed in the room that is left.

    Identical texts count once. The choice under the cap is random but a function of `seed` only, and takes every
    text of either side once before any of that side twice (see `_spread`), but for pairs that are then left out as
    entailed. A question whose answers are all right or all wrong gives none.

    Args:
        answers: None = one that the length limit cut off. It counts as malformed and makes no pair: what its text would
            have come to is not known.
    """
    result = QuestionPairs()
    groups: dict[Verdict, list[str]] = {"right": [], "wrong": [], "malformed": []}
    short: dict[str, str] = {}
    for written in answers:
        if written is None:
            result.verdicts["malformed"] += 1
            result.drops["answer_unfinished"] += 1
            continue
        judged = judge(written, asked)
        result.verdicts[judged.verdict] += 1
        if judged.text in groups[judged.verdict]:
            result.drops["identical_text"] += 1
        else:
            groups[judged.verdict].append(judged.text)
            short[judged.text] = judged.answer
    if not groups["right"]:
        result.is_unsolved = True
        result.drops["question_without_right_answer"] += 1
        return result
    if not groups["wrong"] and not groups["malformed"]:
        result.drops["question_all_right"] += not result.drops["answer_unfinished"]
        return result
    shuffle = random.Random(seed).shuffle
    for group in groups.values():
        group.sort()
        shuffle(group)
    for chosen, rejected in _spread(groups["right"], groups["wrong"]):
        if entails(short[chosen], short[rejected]):
            result.drops["entailment"] += 1
        elif len(result.pairs) >= max_pairs:
            result.drops["over_question_cap"] += 1
        else:
            result.pairs.append(Choice(chosen, rejected, CORRECTNESS_KIND))
    malformed = [text for text in groups["malformed"] if text]
    result.drops["empty_answer"] += len(groups["malformed"]) - len(malformed)
    room = min(max_pairs - len(result.pairs), max_format_pairs)
    for place, rejected in enumerate(malformed[: max(room, 0)]):
        chosen = groups["right"][(-1 - place) % len(groups["right"])]
        result.pairs.append(Choice(chosen, rejected, "format"))
    return result


def keep_minority(kinds: Sequence[str], *, seed: int) -> list[int]:
    """Positions to keep so that format pairs are at most one of FORMAT_PART that remain; every other pair is kept."""
    formats = [i for i, kind in enumerate(kinds) if kind == "format"]
    others = len(kinds) - len(formats)
    room = others // (FORMAT_PART - 1)
    kept = set(formats)
    if len(formats) > room:
        kept = set(random.Random(seed).sample(formats, room))
    return [i for i, kind in enumerate(kinds) if kind != "format" or i in kept]


def _spread(left: Sequence[str], right: Sequence[str]) -> list[tuple[str, str]]:
    """All combinations of chosen (left) and rejected texts (right), each once, each side's texts in turn.

    Both sides go round together, and the rejected one steps one further whenever both are back at their first text.
    """
    round_length = math.lcm(len(left), len(right))
    return [(left[i % len(left)], right[(i + i // round_length) % len(right)]) for i in range(len(left) * len(right))]
