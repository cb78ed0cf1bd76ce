"""Captions against references: CIDEr-D, ROUGE-L and BLEU as COCO's evaluation has them, without Java. Pure.

Tokens are close to those of the Penn Treebank tokenizer that COCO uses: lower case, `don't` -> `do n't`, `dog's` ->
`dog 's`, hyphens stay inside of words, decimal numbers stay whole, marks that only separate are dropped. Unlike there
every Chinese character is a token, and brackets are always dropped.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain

from sacrebleu.metrics.bleu import BLEU

Ngram = tuple[str, ...]
MAX_ORDER = 4
SIGMA = 6.0
ROUGE_BETA = 1.2

_CHINESE = "\u4e00-\u9fff"
_TOKEN = re.compile(rf"[{_CHINESE}]|\d+(?:[.,]\d+)+|[^\W{_CHINESE}]+(?:[-'][^\W{_CHINESE}]+)*|[^\w\s]")
_CLITICS = ("n't", "'s", "'re", "'ve", "'ll", "'d", "'m")
_DROPPED = set("'`\".?!,:;-()[]{}“”‘…–—。，、；：？！（）「」")


def tokenize_caption(text: str) -> list[str]:
    """Words of a caption: "The dogs' T-shirt isn't red." -> the dogs t-shirt is n't red."""
    tokens: list[str] = []
    for token in _TOKEN.findall(text.lower().replace("’", "'")):
        clitic = next((c for c in _CLITICS if token.endswith(c) and len(token) > len(c)), "")
        parts = [token[: len(token) - len(clitic)], clitic] if clitic else [token]
        tokens += ["can", "not"] if token == "cannot" else [part for part in parts if part not in _DROPPED]
    return tokens


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10; the corpus's is their mean.

    10 / 4 x sum over n = 1..4 of the mean over references of the cosine between tf-idf vectors of n-grams, with the
    candidate's counts clipped to the reference's, times exp(-(difference in length)^2 / (2 x 6^2)). Document
    frequencies are those of the references given here, one document per picture: a single picture scores 0, and figures
    of sets of different size do not compare. As in the reference code, length counts bigrams.

    Args:
        candidates: [N], one per picture.
        references: [N], at least one caption each.

    Raises:
        ValueError: no pictures, lengths differ, or a picture without references.

    Source: Vedantam et al. 2015, arXiv:1411.5726, Sec. 5; tylin/coco-caption cider_scorer.py.
    """
    _check(candidates, references)
    counted = [[_ngrams(tokenize_caption(text)) for text in texts] for texts in references]
    frequency = Counter(chain.from_iterable(set().union(*texts) for texts in counted))
    log_pictures = math.log(len(candidates))

    def weigh(counts: Counter[Ngram]) -> dict[Ngram, float]:
        return {gram: n * (log_pictures - math.log(max(1, frequency[gram]))) for gram, n in counts.items()}

    scores = []
    for candidate, texts in zip(candidates, counted, strict=True):
        own = _ngrams(tokenize_caption(candidate))
        weights = weigh(own)
        similarity = sum(_similarity(weights, weigh(text), _length(own) - _length(text)) for text in texts)
        scores.append(10 * similarity / len(texts))
    return scores


def rouge_l(candidate: str, references: Sequence[str]) -> float:
    """F of the longest common subsequence of words, recall weighing 1.2 times precision; 0 to 1.

    Precision and recall are each the best over the references, as in COCO's code, so they may be of two captions.

    Raises:
        ValueError: no reference.

    Source: Lin 2004, "ROUGE", Sec. 3; tylin/coco-caption rouge.py.
    """
    if not references:
        raise ValueError("rouge_l needs at least one reference")
    own = tokenize_caption(candidate)
    precision = recall = 0.0
    for text in references:
        reference = tokenize_caption(text)
        common = _common_subsequence(own, reference)
        precision = max(precision, common / max(1, len(own)))
        recall = max(recall, common / max(1, len(reference)))
    if not precision or not recall:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def bleu_4(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of the whole set up to four words, 0 to 1, unsmoothed, by sacrebleu over `tokenize_caption`'s words.

    Raises:
        ValueError: as `cider_d`.

    Source: Papineni et al. 2002; Post 2018, arXiv:1804.08771.
    """
    _check(candidates, references)
    joined = [[" ".join(tokenize_caption(text)) for text in texts] for texts in references]
    most = max(len(texts) for texts in joined)
    streams = [[texts[place % len(texts)] for texts in joined] for place in range(most)]  # one given twice counts once
    own = [" ".join(tokenize_caption(text)) for text in candidates]
    metric = BLEU(tokenize="none", smooth_method="none", force=True)
    return float(metric.corpus_score(own, streams).score) / 100


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not candidates or len(candidates) != len(references):
        raise ValueError(f"need as many captions as pictures and one at least: {len(candidates)}, {len(references)}")
    if not all(references):
        raise ValueError("every picture needs at least one reference caption")


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, MAX_ORDER + 1)
        for start in range(len(words) - order + 1)
    )


def _length(counts: Counter[Ngram]) -> int:
    return sum(n for gram, n in counts.items() if len(gram) == 2)


def _similarity(own: dict[Ngram, float], other: dict[Ngram, float], difference: int) -> float:
    """Mean over orders of the clipped cosine, times the penalty on length."""
    products, norms = [0.0] * MAX_ORDER, [[0.0] * MAX_ORDER, [0.0] * MAX_ORDER]
    for gram, weight in own.items():
        products[len(gram) - 1] += min(weight, other.get(gram, 0.0)) * other.get(gram, 0.0)
    for squares, weights in zip(norms, (own, other), strict=True):
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight**2
    cosines = [
        product / math.sqrt(left * right) if left and right else 0.0
        for product, left, right in zip(products, *norms, strict=True)
    ]
    return sum(cosines) / MAX_ORDER * math.exp(-(difference**2) / (2 * SIGMA**2))


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest; a row of the table is the bits of one integer (Hyyro 2004)."""
    left, right = sorted((left, right), key=len)
    places: dict[str, int] = {}
    for place, word in enumerate(left):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(left)) - 1
    row = full
    for word in right:
        kept = row & places.get(word, 0)
        row = ((row + kept) | (row - kept)) & full
    return len(left) - row.bit_count()
