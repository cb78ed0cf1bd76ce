"""Zero-shot retrieval and classification: ranks by cosine, from embeddings of pictures and texts. Pure functions.

Called by the clip job while a tower is trained, and by the retrieval job for any CLIP.
"""

from collections.abc import Sequence
from math import comb

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_ONCE = 512
"""Queries compared at a time: 25,010 captions with 5,000 pictures would be 500 MB of cosines."""


def retrieval_recall(query_embeds: Tensor, target_embeds: Tensor, k: int) -> float:
    """Share of queries whose own target is among the k most similar ones (cosine).

    Args:
        query_embeds: [N, D], for example of pictures.
        target_embeds: [N, D], row i belongs to query i. They must differ in content.
        k: >= 1. Targets as similar as the own one count as better, so equal embeddings give no credit.

    Returns:
        0 to 1.

    Raises:
        ValueError: shapes differ, there are no rows, or an embedding is not finite.
    """
    if query_embeds.shape != target_embeds.shape or not len(query_embeds):
        shapes = f"{tuple(query_embeds.shape)} and {tuple(target_embeds.shape)}"
        raise ValueError(f"queries and targets must have one shape [N, D] with N > 0, not {shapes}")
    ahead = num_ahead(query_embeds, target_embeds, [[row] for row in range(len(query_embeds))])
    return float((ahead < k).float().mean())


def num_ahead(query_embeds: Tensor, target_embeds: Tensor, positives: Sequence[Sequence[int]]) -> Tensor:
    """How many wrong targets stand before the first right one in each query's ranking by cosine.

    A query is answered within the first k when this is below k: COCO's rule for several captions of a picture, where
    any of them counts. Wrong targets as similar as the best right one stand before it.

    Args:
        query_embeds: [N, D], of any length.
        target_embeds: [M, D].
        positives: rows of `target_embeds` that are right, at least one for each query.

    Returns:
        [N] int64, from 0 to M - 1.

    Raises:
        ValueError: no queries or targets, widths that differ, a query without a right target, or an embedding that is
            not finite (its comparisons would all be false, which reads as the first place).

    Source: Karpathy & Fei-Fei 2015, arXiv:1412.2306, Sec. 4.2 (recall@k on Flickr and COCO).
    """
    if not len(query_embeds) or query_embeds.shape[1:] != target_embeds.shape[1:] or query_embeds.ndim != 2:
        shapes = f"{tuple(query_embeds.shape)} and {tuple(target_embeds.shape)}"
        raise ValueError(f"queries and targets must be [N, D] and [M, D] with N, M > 0, not {shapes}")
    if len(positives) != len(query_embeds) or not all(positives):
        raise ValueError(f"{len(query_embeds)} queries need as many lists of right targets, none of them empty")
    queries, targets = _unit(query_embeds), _unit(target_embeds)
    ahead = torch.empty(len(queries), dtype=torch.int64)
    for start in range(0, len(queries), ROWS_AT_ONCE):
        cosines = queries[start : start + ROWS_AT_ONCE] @ targets.T
        is_right = torch.zeros_like(cosines, dtype=torch.bool)
        for row, right in enumerate(positives[start : start + len(cosines)]):
            is_right[row, list(right)] = True
        best = cosines.masked_fill(~is_right, float("-inf")).amax(dim=1, keepdim=True)
        ahead[start : start + len(cosines)] = ((cosines >= best) & ~is_right).sum(dim=1).cpu()
    return ahead


def chance_recall(num_targets: int, num_right: Sequence[int], k: int) -> float:
    """recall@k of a random ranking: the mean of 1 - C(M - right, k) / C(M, k).

    Args:
        num_targets: M.
        num_right: right targets of each query, 1 to M.
    """
    k = min(k, num_targets)
    missed = [comb(num_targets - right, k) / comb(num_targets, k) for right in num_right]
    return 1 - sum(missed) / len(missed)


def class_embeds(text_embeds: Tensor) -> Tensor:
    """One embedding per class from those of its prompts: normalised, averaged over templates, normalised again.

    Args:
        text_embeds: [C, T, D], class names in T templates.

    Returns:
        [C, D] of length 1. A picture's class is the most similar one: `num_ahead` with the true class as the right one.

    Source: Radford et al. 2021, arXiv:2103.00020, Sec. 3.1.4 (prompt ensembling).
    """
    return F.normalize(_unit(text_embeds).mean(dim=1), dim=-1)


def _unit(embeds: Tensor) -> Tensor:
    if not torch.isfinite(embeds).all():
        raise ValueError("an embedding is not finite: the CLIP that made it is damaged, or overflows in its precision")
    return F.normalize(embeds.float(), dim=-1)
