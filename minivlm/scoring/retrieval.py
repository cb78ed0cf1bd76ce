"""Zero-shot retrieval: does a picture find its own caption among all captions? Called by the clip job."""

import torch.nn.functional as F
from torch import Tensor


def retrieval_recall(query_embeds: Tensor, target_embeds: Tensor, k: int) -> float:
    """Share of queries whose own target is among the k most similar ones (cosine).

    Args:
        query_embeds: [N, D], for example of pictures.
        target_embeds: [N, D], row i belongs to query i. They must differ in content.
        k: >= 1. Targets as similar as the own one count as better, so equal embeddings give no credit.

    Returns:
        0 to 1.

    Raises:
        ValueError: shapes differ, or there are no rows.
    """
    if query_embeds.shape != target_embeds.shape or not len(query_embeds):
        shapes = f"{tuple(query_embeds.shape)} and {tuple(target_embeds.shape)}"
        raise ValueError(f"queries and targets must have one shape [N, D] with N > 0, not {shapes}")
    similarity = F.normalize(query_embeds.float(), dim=-1) @ F.normalize(target_embeds.float(), dim=-1).T
    own = similarity.diagonal().unsqueeze(1)
    num_not_worse = (similarity >= own).sum(dim=1) - 1
    return float((num_not_worse < k).float().mean())
