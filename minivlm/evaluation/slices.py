"""Where a checkpoint is worse: its figures over the questions that share a trait, against what their tasks lead one to
expect. Pure functions over the rows of samples.jsonl.

Traits are read off the questions themselves: language, source, group, number of pictures, a colour that is named, what
kind of answer is true (a number, yes or no), a word of the question. `write_report` calls `find_slices`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minivlm.scoring.answers import normalize
from minivlm.scoring.scorers import CAPTION_SCORERS
from minivlm.scoring.statistics import mean_interval

COLOURS = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "cyan": "青色", "blue": "蓝色",
    "purple": "紫色", "pink": "粉色", "brown": "棕色", "black": "黑色", "white": "白色", "gray": "灰色",
}  # fmt: skip
"""Basic colour terms, and what they are called in Chinese."""

MIN_ROWS = 10
"""Slices of fewer questions say nothing and are left out."""

MAX_WORDS = 12
"""Words of questions that are shown: those with the clearest loss."""

MAX_NUMBER = 10
"""Larger true numbers are one slice."""

_WORD = re.compile(r"[^\W\d_]{3,}")
_CJK = re.compile(r"[\u3400-\u9fff]")
_COLOUR_WORD = re.compile(rf"\b({'|'.join(COLOURS)}|grey)\b")
_POLAR = {"yes": "yes", "no": "no", "是": "yes", "否": "no", "有": "yes", "没有": "no"}


@dataclass(frozen=True)
class Slice:
    """Questions that share a trait. `figures` has (mean, low, high) per checkpoint, with 95 % intervals by picture.

    `expected` is what the last checkpoint would have here if each question scored like the mean of its own task (the
    slice itself included).
    """

    trait: str
    value: str
    n: int
    num_images: int
    figures: tuple[tuple[float, float, float], ...]
    expected: float

    @property
    def difference(self) -> float:
        """The last checkpoint's mean against its tasks."""
        return self.figures[-1][0] - self.expected

    @property
    def is_worse(self) -> bool:
        """The whole interval of the last checkpoint lies below what is expected. Of many slices some do by chance."""
        return self.figures[-1][2] < self.expected


def find_slices(rows: Sequence[Sequence[Mapping[str, Any]]]) -> list[Slice]:
    """Slices of all questions but captions; by trait, worst first.

    Args:
        rows: per checkpoint the rows of the same questions in the same order. The last checkpoint orders the slices.
    """
    kept = [index for index, row in enumerate(rows[-1]) if row["scorer"] not in CAPTION_SCORERS]
    members: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for index in kept:
        for trait in sorted(traits(rows[-1][index])):
            members[trait].append(index)
    values = Counter(trait for trait, _ in members)
    slices = [
        _slice(trait, value, indices, rows, _task_means(rows[-1], kept))
        for (trait, value), indices in members.items()
        if len(indices) >= MIN_ROWS and (values[trait] > 1 and len(indices) < len(kept))
    ]
    words = sorted((found for found in slices if found.trait == "word" and found.is_worse), key=_clearness)[:MAX_WORDS]
    others = [found for found in slices if found.trait != "word"]
    return sorted(others, key=lambda found: (found.trait, found.difference, found.value)) + words


def traits(row: Mapping[str, Any]) -> set[tuple[str, str]]:
    """What a question shares with others, as (trait, value)."""
    question, truth = row["question"].replace("<image>", " "), row["truth"]
    found = {("language", row["language"]), ("pictures", str(len(row["images"])))}
    found |= {(name, row[name]) for name in ("source", "group") if row[name]}
    text = f"{question} {truth}".casefold()
    found |= {("colour", "gray" if name == "grey" else name) for name in _COLOUR_WORD.findall(text)}
    found |= {("colour", name) for name, chinese in COLOURS.items() if chinese in text}
    answer = normalize(truth)
    if answer in _POLAR:
        found.add(("answer", _POLAR[answer]))
    elif re.fullmatch(r"[+-]?\d+(?:\.\d+)?", answer):
        number = float(answer)
        is_listed = number.is_integer() and 0 <= number <= MAX_NUMBER
        found.add(("answer", f"number {int(number)}" if is_listed else "another number"))
    return found | {("word", word) for word in _WORD.findall(question.casefold()) if not _CJK.search(word)}


def _task_means(rows: Sequence[Mapping[str, Any]], kept: Sequence[int]) -> dict[str, float]:
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for index in kept:
        scores[rows[index]["task"]].append(rows[index]["score"])
    return {task: sum(values) / len(values) for task, values in scores.items()}


def _slice(
    trait: str,
    value: str,
    indices: Sequence[int],
    rows: Sequence[Sequence[Mapping[str, Any]]],
    task_means: Mapping[str, float],
) -> Slice:
    last = [rows[-1][index] for index in indices]
    clusters = [row["cluster"] for row in last]
    expected = sum(task_means[row["task"]] for row in last) / len(last)
    figures = tuple(mean_interval([own[index]["score"] for index in indices], clusters) for own in rows)
    return Slice(trait, value, len(indices), len(set(clusters)), figures, expected)


def _clearness(found: Slice) -> tuple[float, str]:
    return found.figures[-1][2] - found.expected, found.value
