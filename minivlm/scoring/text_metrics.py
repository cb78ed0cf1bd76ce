"""The short-answer metrics of public benchmarks, each equal to its reference scorer. Pure text functions.

Quirks of the references are kept, because figures are compared with published ones; each is named where it is.
"""

import re
from collections.abc import Sequence

RELAXED_CHANGE = 0.05
ANLS_THRESHOLD = 0.5
VQA_MATCHES = 3
"""So many annotators with the same answer make it fully right."""

_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
    you'll you're you've
"""
_MENDED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, char in enumerate(word)
    if char == "'"
} | {"somebody'd": "somebodyd"}  # the reference has this one the wrong way round
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBER_WORDS.split())}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32


def relaxed_match(prediction: str, truth: str) -> bool:
    """Numbers within 5 % of the truth, everything else equal but for case (ChartQA).

    "%" at the end divides by 100, so "25%" is 0.25 and not 25. Text is compared as it stands: a full stop at the end is
    a difference. A truth of 0 is compared as text ("0.0" is wrong), as no change relative to 0 exists.

    Source: Masry et al. 2022, arXiv:2203.10244, Sec. 5.1; lmms-eval tasks/chartqa/utils.py.
    """
    given, expected = _to_number(prediction), _to_number(truth)
    if given is not None and expected:
        return abs(given - expected) / abs(expected) <= RELAXED_CHANGE
    return prediction.lower() == truth.lower()


def anls(prediction: str, truths: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest truth, and 0 where that is below 0.5 (DocVQA, InfoVQA).

    1 - min over truths of distance / length of the longer text. The distance is taken without case and with blanks
    made single; the lengths are those of the texts as they stand, as in the reference.

    Returns:
        0, or 0.5 to 1.

    Raises:
        ValueError: no truth.

    Source: Biten et al. 2019, arXiv:1905.13648, Eq. 1; lmms-eval api/metrics.py, `anls`.
    """
    if not truths:
        raise ValueError("anls needs at least one true answer")
    similarity = 1 - min(_relative_distance(prediction, truth) for truth in truths)
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over annotators of min(1, others who gave this answer / 3), after `vqa_normalize` (VQAv2, TextVQA).

    With fewer than four answers full marks are out of reach: leave-one-out needs three others.

    Raises:
        ValueError: no answer.

    Source: Antol et al. 2015, arXiv:1505.00468, Sec. 3; lmms-eval tasks/textvqa/utils.py. Unlike the VQA challenge's
    own script, texts are normalised also where all annotators agree.
    """
    if not answers:
        raise ValueError("vqa_accuracy needs at least one true answer")
    given = vqa_normalize(prediction)
    matches = [vqa_normalize(answer) == given for answer in answers]
    total = sum(matches)
    return sum(min(1.0, (total - match) / VQA_MATCHES) for match in matches) / len(answers)


def vqa_normalize(text: str) -> str:
    """EvalAI's spelling of an answer: lower case, no articles and punctuation, digits for number words, contractions.

    "The Two dogs." -> "2 dogs", "dont" -> "don't", "1,000" -> "1000", "none" -> "0", "3.5" stays.
    A punctuation mark becomes nothing where it stands beside a blank anywhere in the text, else a blank.

    Source: facebookresearch/mmf pythia/tasks/processors.py, EvalAIAnswerProcessor (32 full stops at most go, as there).
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    given = text.replace("\n", " ").replace("\t", " ").strip()
    text = given
    for mark in _PUNCTUATION:
        is_loose = f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if is_loose else " ")
    text = _PERIOD.sub("", text, count=_MAX_PERIODS)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)


def edit_distance(left: str, right: str) -> int:
    """Levenshtein distance: fewest insertions, deletions and replacements of characters.

    A column of the table is two integers of len(left) bits, so that long texts cost little (Hyyro 2003, "A
    Bit-Vector Algorithm for Computing Levenshtein and Damerau Edit Distances", Fig. 3).
    """
    if not left or not right:
        return len(left) + len(right)
    left, right = sorted((left, right), key=len)
    places: dict[str, int] = {}
    for place, char in enumerate(left):
        places[char] = places.get(char, 0) | 1 << place
    full, last = (1 << len(left)) - 1, 1 << (len(left) - 1)
    rises, falls, distance = full, 0, len(left)
    for char in right:
        equal = places.get(char, 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal | falls
        up, down = falls | ~(diagonal | rises) & full, rises & diagonal
        distance += bool(up & last) - bool(down & last)
        up, down = (up << 1 | 1) & full, (down << 1) & full
        rises, falls = down | ~(diagonal | up) & full, up & diagonal
    return distance


def _relative_distance(prediction: str, truth: str) -> float:
    length = max(len(truth.upper()), len(prediction.upper()))
    if length == 0:
        return 0.0
    left, right = (" ".join(text.strip().lower().split()) for text in (prediction, truth))
    return edit_distance(left, right) / length


def _to_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
