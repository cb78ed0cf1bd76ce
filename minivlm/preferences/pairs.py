"""The rules that turn one question's sampled answers into chosen/rejected pairs. Pure functions.

After MMPR's correctness pipeline (arXiv:2411.10442, Sec. 3): right answers x wrong answers, and right answers x
answers that break the asked format. Departures: the entailment rule compares whole words (MMPR's plain substring
would drop 1 against 10), and format pairs are limited to a share of all pairs.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from minivlm.scoring.answers import MARKER, extract_answer, is_correct, normalize

Verdict = Literal["right", "wrong", "malformed"]
FORMAT_SHARE = 0.2
"""Most format pairs, as a share of all pairs."""


@dataclass(frozen=True)
class Choice:
    """One chosen/rejected pair of a question; `kind` is "correctness" or "format"."""

    chosen: str
    rejected: str
    kind: str


@dataclass
class QuestionPairs:
    """Pairs of one question, and why others were not made."""

    pairs: list[Choice] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)


def is_well_formed(text: str, *, reasoned: bool) -> bool:
    """Whether an answer has the asked form.

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


def judge(text: str, truth: str, *, reasoned: bool) -> Verdict:
    """ "malformed" if the form is broken, else "right" or "wrong" by comparison with the truth."""
    if not is_well_formed(text, reasoned=reasoned):
        return "malformed"
    return "right" if is_correct(text, truth) else "wrong"


def entails(chosen: str, rejected: str) -> bool:
    """Whether the rejected answer contains the chosen one ("dog" in "a dog and a cat"): then it is not clearly wrong.

    Compared after normalisation; Latin words and numbers must match as a whole, Chinese as a substring.
    """
    inner, outer = normalize(extract_answer(chosen) or chosen), normalize(extract_answer(rejected) or rejected)
    if not inner:
        return False
    start = r"(?<![a-z0-9.])" if re.match(r"[a-z0-9]", inner) else ""
    end = r"(?![a-z0-9]|\.\d)" if re.search(r"[a-z0-9]$", inner) else ""
    return re.search(start + re.escape(inner) + end, outer) is not None


def choose_pairs(answers: Sequence[str], truth: str, *, reasoned: bool, max_pairs: int, seed: str) -> QuestionPairs:
    """Pairs of one question: right x wrong first, then at most one right x malformed in the room that is left.

    Identical texts count once. The choice under the cap is random but a function of `seed` only, and spreads over
    different texts before any is used twice. A question whose answers are all right or all wrong gives none.
    """
    result = QuestionPairs()
    groups: dict[Verdict, list[str]] = {"right": [], "wrong": [], "malformed": []}
    for text in answers:
        verdict = judge(text, truth, reasoned=reasoned)
        result.verdicts[verdict] += 1
        if text.strip() in groups[verdict]:
            result.drops["identical_text"] += 1
        else:
            groups[verdict].append(text.strip())
    if not groups["right"]:
        result.drops["question_without_right_answer"] += 1
        return result
    if not groups["wrong"] and not groups["malformed"]:
        result.drops["question_all_right"] += 1
        return result
    shuffle = random.Random(seed).shuffle
    for group in groups.values():
        group.sort()
        shuffle(group)
    for chosen, rejected in _spread(groups["right"], groups["wrong"]):
        if entails(chosen, rejected):
            result.drops["entailment"] += 1
        elif len(result.pairs) >= max_pairs:
            result.drops["over_question_cap"] += 1
        else:
            result.pairs.append(Choice(chosen, rejected, "correctness"))
    malformed = [text for text in groups["malformed"] if text]
    result.drops["empty_answer"] += len(groups["malformed"]) - len(malformed)
    if malformed and len(result.pairs) < max_pairs:
        result.pairs.append(Choice(groups["right"][-1], malformed[0], "format"))
    return result


def keep_minority(kinds: Sequence[str], *, seed: int) -> list[int]:
    """Positions to keep so that format pairs are at most FORMAT_SHARE of what remains; every other pair is kept."""
    formats = [i for i, kind in enumerate(kinds) if kind == "format"]
    others = len(kinds) - len(formats)
    room = int(others * FORMAT_SHARE / (1 - FORMAT_SHARE))
    kept = set(formats)
    if len(formats) > room:
        kept = set(random.Random(seed).sample(formats, room))
    return [i for i, kind in enumerate(kinds) if kind != "format" or i in kept]


def _spread(left: Sequence[str], right: Sequence[str]) -> list[tuple[str, str]]:
    """All combinations, ordered so that the first ones use different texts."""
    return [(left[i], right[(i + shift) % len(right)]) for shift in range(len(right)) for i in range(len(left))]
