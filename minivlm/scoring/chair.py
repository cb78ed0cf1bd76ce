"""CHAIR: which objects a caption names that are not in the picture. Pure.

An object is a name of a vocabulary. Two are here: of the embedded miniworld's captions (colour and shape, `red ring` or
红色圆环) and of COCO's 80 categories. The truth comes from reference captions.

Source: Rohrbach et al. 2018, arXiv:1809.02156, Sec. 2.1; lmms-eval tasks/coco_cap_chair/utils.py.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from minivlm.scoring.captions import tokenize_caption
from minivlm.scoring.coco_objects import IRREGULAR, NAME_OF

COLOURS = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色"}
SHAPES = {"ring": "圆环", "square": "方形", "triangle": "三角形", "cross": "十字"}
"""Names of the miniworld, English and Chinese."""

_ENGLISH = re.compile(rf"\b({'|'.join(COLOURS)})\s+({'|'.join(SHAPES)})\b")
_CHINESE = re.compile(rf"({'|'.join(COLOURS.values())})({'|'.join(SHAPES.values())})")
_TO_ENGLISH = {chinese: english for names in (COLOURS, SHAPES) for english, chinese in names.items()}
_PART = re.compile(
    rf"[a-z]\d (?:small|large) (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})|text \w+"
    rf"|[a-z]\d[小大](?:{'|'.join(COLOURS.values())})(?:{'|'.join(SHAPES.values())})|文字\w+"
)


def miniworld_objects(text: str) -> list[str]:
    """Every mention of a shape with its colour, in English: "a1 small red ring" and "a1小红色圆环" -> red ring.

    Sizes and cells do not count; nor does a colour that stands elsewhere ("the ring is red").
    """
    english = [f"{colour} {shape}" for colour, shape in _ENGLISH.findall(text.lower())]
    chinese = [f"{_TO_ENGLISH[colour]} {_TO_ENGLISH[shape]}" for colour, shape in _CHINESE.findall(text)]
    return english + chinese


def is_miniworld_caption(text: str) -> bool:
    """Whether the text is wholly in the form of the miniworld's captions, so that it tells all that is there."""
    return all(_PART.fullmatch(part) for part in re.split(r", |，", text))


def coco_objects(text: str) -> list[str]:
    """Every mention of a COCO category, by its name: "Two men ride bikes" -> person, bicycle. Longest names first."""
    words = [_singular(word) for word in tokenize_caption(text)]
    found, place = [], 0
    while place < len(words):
        size = next((n for n in (3, 2, 1) if " ".join(words[place : place + n]) in NAME_OF), 0)
        if size:
            found.append(NAME_OF[" ".join(words[place : place + size])])
        place += max(size, 1)
    return found


def chair_counts(mentioned: Sequence[str], present: Iterable[str]) -> dict[str, float]:
    """Of one caption: mentions, those of absent objects (each time again), objects present, and those of them named."""
    there = set(present)
    return {
        "chair_mentions": float(len(mentioned)),
        "chair_hallucinated": float(sum(name not in there for name in mentioned)),
        "chair_present": float(len(there)),
        "chair_named": float(len(there & set(mentioned))),
    }


def chair_figures(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`chair_i`: hallucinated mentions of all; `chair_s`: captions with one at least; `chair_recall`: objects named of
    those present. Rows without counts are left out; a share of nothing is left out too (the reference divides by 0)."""
    counted = [row for row in rows if "chair_mentions" in row]
    if not counted:
        return {}
    total = {key: sum(row[key] for row in counted) for key in chair_counts((), ())}
    figures = {"chair_s": sum(row["chair_hallucinated"] > 0 for row in counted) / len(counted)}
    if total["chair_mentions"]:
        figures["chair_i"] = total["chair_hallucinated"] / total["chair_mentions"]
    if total["chair_present"]:
        figures["chair_recall"] = total["chair_named"] / total["chair_present"]
    return figures


def _singular(word: str) -> str:
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word in NAME_OF or not word.endswith("s") or word.endswith("ss"):
        return word
    return next((stem for stem in (word[:-1], word[:-2]) if stem in NAME_OF), word[:-1])
