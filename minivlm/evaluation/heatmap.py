"""Where answers looked, as pictures: which questions are shown, and the attention laid over what the tower saw.

Pure functions. `minivlm/inference/attention.py` computes the weights (and says which layers and heads); the evaluation
writes the overlays beside its answers as attention.json, and the report shows the checkpoints side by side.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from minivlm.evaluation.tasks import CAPTION, Question

SIDE_PX = 160
"""Shortest side of an overlay; smaller pictures are enlarged."""

_COLD, _HOT = np.array([20, 24, 60]), np.array([255, 150, 30])


def choose_questions(questions: Sequence[Question], count: int) -> list[int]:
    """Positions of the questions whose attention is shown: of tasks in turn, with pictures, captions last.

    It depends on nothing that a model did, so every checkpoint is shown on the same ones.
    """
    by_task: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        if question.images:
            by_task.setdefault(question.task, []).append(index)
    tasks = sorted(by_task, key=lambda task: (task == CAPTION, task))
    turns = max((len(indices) for indices in by_task.values()), default=0)
    ordered = [by_task[task][turn] for turn in range(turns) for task in tasks if turn < len(by_task[task])]
    return ordered[:count]


def describe(seen: Sequence[np.ndarray], grids: Sequence[np.ndarray | None], share: float) -> dict[str, Any] | None:
    """What attention.json says of a question: an overlay per picture, and the share of attention that went to them all.

    None where image tokens have no place in the picture.
    """
    laid = [overlay(picture, grid) for picture, grid in zip(seen, grids, strict=True) if grid is not None]
    return {"overlays": [png_uri(picture) for picture in laid], "share": share} if laid else None


def overlay(seen: np.ndarray, grid: np.ndarray) -> Image.Image:
    """The picture, dark where nobody looked and glowing where the answer looked most.

    Args:
        seen: [H, W, 3] uint8, the picture as the tower saw it (resized and cropped).
        grid: [side, side] weights >= 0 over its patches; scaled so that the largest is 1.

    Raises:
        ValueError: a weight that is negative or not finite.
    """
    if not np.isfinite(grid).all() or grid.min() < 0:
        raise ValueError("attention weights must be finite and not negative")
    height, width = seen.shape[:2]
    scale = max(1, -(-SIDE_PX // min(height, width)))
    size = (width * scale, height * scale)
    picture = np.asarray(Image.fromarray(seen).resize(size, Image.Resampling.NEAREST), dtype=np.float32)
    heat = Image.fromarray((grid / max(float(grid.max()), 1e-12)).astype(np.float32))
    weight = np.asarray(heat.resize(size, Image.Resampling.BILINEAR))[..., None].clip(0, 1)
    colour = _COLD * (1 - weight) + _HOT * weight
    return Image.fromarray((0.5 * picture + 0.5 * colour).round().clip(0, 255).astype(np.uint8))


def png_uri(picture: Image.Image) -> str:
    """A picture as a PNG data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
