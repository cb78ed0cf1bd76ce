"""Which token comes next, and whether rounding could have decided it. Pure tensor functions, for `model/generate.py`.

A sum of products in float32 depends, in its last bits, on the shapes of the matrices: the same row gets slightly other
logits in another batch. That only matters where two tokens are nearly equally good, so those places are marked.
"""

import torch
from torch import Tensor

MARGIN = 3e-5
"""Logits of a float32 row that differ by less than this share of its largest one may change places in another batch.
More than ten times the largest change that `benchmarks/batch_invariance.py` found."""


def choose(logits: Tensor, temperature: float, top_k: int, drawn: Tensor | None) -> tuple[Tensor, Tensor]:
    """Next tokens: the best ones, or where the cumulative distribution passes `drawn`.

    Args:
        logits: [B, V] float32.
        temperature, top_k: as `generate`; unread where `drawn` is None.
        drawn: [B] float64 in [0, 1) on the CPU; None = greedy.

    Returns:
        Tokens [B] int64 and doubts [B] bool, both on the CPU. A doubt: errors of `MARGIN` could change the token.
    """
    margin = MARGIN * logits.abs().amax(dim=-1)
    if drawn is None:
        best = logits.topk(2, dim=-1)
        doubts = best.values[:, 0] - best.values[:, 1] < margin
        return logits.argmax(dim=-1).cpu(), doubts.cpu()
    candidates, beside = None, torch.full_like(logits[:, :1], torch.inf)
    if 0 < top_k < logits.shape[-1]:
        best = logits.topk(top_k + 1, dim=-1)
        # [B, k]: how far each candidate is from the next better or the next worse one, whichever is nearer.
        gaps = -best.values.diff(dim=-1)
        beside = torch.minimum(gaps, torch.cat([torch.full_like(gaps[:, :1], torch.inf), gaps[:, :-1]], dim=-1))
        logits, candidates = best.values[:, :-1], best.indices[:, :-1]
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    places = drawn.to(logits.device).unsqueeze(1) * cumulative[:, -1:]
    chosen = (cumulative <= places).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    # Errors e of the logits move a share p of the distribution by 2 p (1 - p) e / temperature <= e / (2 temperature).
    near = (cumulative - places).abs().amin(dim=-1) < margin / (2 * temperature)
    swapped = beside.expand(-1, logits.shape[-1]).gather(1, chosen)[:, 0] < margin
    tokens = chosen if candidates is None else candidates.gather(1, chosen)
    return tokens[:, 0].cpu(), (near | swapped).cpu()
