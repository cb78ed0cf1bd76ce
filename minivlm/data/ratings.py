"""Ratings that rows bring along (FineVision's `relevance_ratings`, LAION's `similarity`): read, kept, applied.

A column holds one number, or a list with one for each answer. Answers below a threshold are left out of their
conversation, rows without any other are left out altogether, and what has no rating stays, all as in
huggingface/nanoVLM data/datasets.py. Pure.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from minivlm.data.errors import RowError
from minivlm.schema import IMAGE_PLACEHOLDER, Message, Sample

Ratings = list[list[float | None] | None]
"""Of each column asked for, one value an answer; None where a row has none."""


def read_ratings(row: Mapping[str, Any], columns: Sequence[str], num_answers: int) -> Ratings:
    """The row's values in these columns.

    Raises:
        RowError: a value that is no number, or not as many as answers.
    """
    found: Ratings = []
    for column in columns:
        given = row.get(column)
        if given is None:
            found.append(None)
            continue
        values = list(given) if isinstance(given, list | tuple) else [given] * num_answers
        if len(values) != num_answers:
            raise RowError(f"`{column[:40]}` has {len(values)} ratings for {num_answers} answer(s)")
        found.append([_number(column, value) for value in values])
    return found


def _number(column: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30:
        raise RowError(f"`{column[:40]}` must be a number, or one for each answer")
    return None if math.isnan(value) else float(value)


def passing_answers(ratings: Ratings, thresholds: Sequence[float]) -> list[bool] | None:
    """Which answers reach every threshold; None where all do, and where no column is asked for.

    Args:
        thresholds: one for each column of `ratings`.
    """
    passes: list[bool] = []
    for values, least in zip(ratings, thresholds, strict=True):
        for answer, value in enumerate(values or ()):
            passes += [True] * (answer + 1 - len(passes))
            passes[answer] &= value is None or value >= least
    return None if all(passes) else passes


def keep_answers(sample: Sample, passes: Sequence[bool]) -> Sample:
    """The conversation without the questions and answers that do not pass; at least one must.

    Pictures of a question that goes move in front of the next one that stays; those that only questions at the end
    show go too. System turns stay.
    """
    kept: list[Message] = []
    pictures: list[int] = []
    turn: list[tuple[Message, list[int]]] = []
    waiting: list[int] = []
    answer, picture = 0, 0
    for message in sample.messages:
        count = 0 if message.role == "assistant" else message.content.count(IMAGE_PLACEHOLDER)
        turn.append((message, list(range(picture, picture + count))))
        picture += count
        if message.role != "assistant":
            continue
        for item, shown in turn:
            if not passes[answer] and item.role == "user":
                waiting += shown
            elif passes[answer] or item.role == "system":
                if item.role == "user" and waiting:
                    item = replace(item, content=f"{IMAGE_PLACEHOLDER}\n" * len(waiting) + item.content)
                    shown, waiting = waiting + shown, []
                kept.append(item)
                pictures += shown
        turn, answer = [], answer + 1
    return replace(
        sample,
        messages=tuple(kept),
        images=tuple(sample.images[i] for i in pictures),
        image_sha256=tuple(sample.image_sha256[i] for i in pictures),
    )
