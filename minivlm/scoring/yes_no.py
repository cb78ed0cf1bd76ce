"""Yes/no questions: what an answer says, and the figures of a set of them (POPE, MME, existence). Pure.

A model that always says yes reaches an F1 of 0.67 on a balanced set, so accuracy and the share of yes stand beside it.
"""

from collections import defaultdict
from collections.abc import Sequence

from minivlm.scoring.answers import is_correct, normalize

_PAIRS = (("yes", "no"), ("是", "否"), ("有", "没有"))
_PAIR_OF = {word: pair for pair in _PAIRS for word in pair}
PERCEPTION = {
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
}  # fmt: skip
"""One of MME's two halves (Fu et al. 2023, arXiv:2306.13394, Sec. 2); the other one, cognition, are commonsense
reasoning, numerical calculation, text translation and code reasoning."""


def yes_or_no(truth: str) -> bool | None:
    """True for yes, 是, 有; False for no, 否, 没有; None for any other truth."""
    word = normalize(truth)
    return word == _PAIR_OF[word][0] if word in _PAIR_OF else None


def says(answer: str, truth: str) -> bool | None:
    """What an answer to a yes/no question says by the rules of `is_correct`, in the words of its truth; None for
    neither."""
    yes, no = _PAIR_OF[normalize(truth)]
    if is_correct(answer, yes):
        return True
    return False if is_correct(answer, no) else None


def says_strictly(answer: str) -> bool | None:
    """The whole answer is that word, whatever its case (lmms-eval tasks/pope/utils.py); "Yes." is neither."""
    return {"yes": True, "no": False}.get(answer.lower().strip())


def says_loosely(answer: str) -> bool:
    """No where the first sentence has the word "No", "no" or "not", else yes, also where nothing was said (InternVL
    internvl_chat/eval/pope/eval_pope.py)."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return {"No", "no", "not"}.isdisjoint(words)


def says_at_first(answer: str) -> bool | None:
    """MME's rule: without full stops "yes", "no", "y" or "n", or one of the words within the first four characters
    (lmms-eval tasks/mme/utils.py)."""
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": True, "n": False}.get(text)
    start = text[:4]
    return True if "yes" in start else False if "no" in start else None


def yes_no_figures(said: Sequence[bool | None], truths: Sequence[bool]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 of yes; `yes_ratio`, the share of *answers* that say yes; `unclear`, of neither.

    Precision is of what was called yes, recall of all whose truth is yes; 0 where there is none. An unclear answer is
    wrong and, where the truth is yes, missed: lmms-eval leaves it out of the recall. Its yes ratio counts truths, not
    answers (tasks/pope/utils.py), so it is a constant of the file; this one is POPE's own (Li et al. 2023,
    arXiv:2305.10355).

    Raises:
        ValueError: no answers, or not as many as truths.
    """
    if not truths or len(said) != len(truths):
        raise ValueError(f"need as many answers as truths and at least one, got {len(said)} and {len(truths)}")
    hits = sum(bool(answer) and truth for answer, truth in zip(said, truths, strict=True))
    called, present = sum(answer is True for answer in said), sum(truths)
    precision, recall = (hits / count if count else 0.0 for count in (called, present))
    return {
        "accuracy": sum(answer is truth for answer, truth in zip(said, truths, strict=True)) / len(truths),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": called / len(truths),
        "unclear": sum(answer is None for answer in said) / len(truths),
    }


def mme_figures(right: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """MME's score of a category is 100 x (accuracy + accuracy plus), at most 200; perception and cognition sum theirs.

    Args:
        right: 1 or 0 for each question.
        groups: CATEGORY/PICTURE of each; a picture's two questions share it.

    Returns:
        `accuracy_plus`: share of pictures with both questions right. `perception`, `cognition`: sums over the
        categories that occur; what is not of perception is of cognition, as upstream. `unpaired`: pictures with one
        question or more than two, which count for none of these (a row that was set aside takes the other one with it).

    Source: arXiv:2306.13394, Sec. 2.2; lmms-eval tasks/mme/utils.py, which stops at such a picture.
    """
    by_picture: defaultdict[str, list[float]] = defaultdict(list)
    for score, group in zip(right, groups, strict=True):
        by_picture[group].append(score)
    pairs = {group: scores for group, scores in by_picture.items() if len(scores) == 2}
    by_category: defaultdict[str, list[float]] = defaultdict(list)
    for group, scores in pairs.items():
        by_category[group.partition("/")[0]].append(sum(scores) / 2 + (sum(scores) == 2))
    points = {category: 100 * sum(values) / len(values) for category, values in by_category.items()}
    figures = {"unpaired": float(len(by_picture) - len(pairs))}
    if pairs:
        figures["accuracy_plus"] = sum(sum(scores) == 2 for scores in pairs.values()) / len(pairs)
    halves: defaultdict[str, float] = defaultdict(float)
    for category, value in points.items():
        halves["perception" if category in PERCEPTION else "cognition"] += value
    return figures | halves
