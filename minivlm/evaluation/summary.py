"""From answers to scored rows, and from rows to the figures of one checkpoint. Pure functions.

Captions are scored by tokens (how much of the reference is reproduced), everything else by right or wrong.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minivlm.evaluation.tasks import CAPTION, Question
from minivlm.scoring.answers import extract_answer, is_correct
from minivlm.scoring.metrics import token_accuracy, token_f1
from minivlm.scoring.statistics import macro_interval, mean_interval


@dataclass(frozen=True)
class Reply:
    """What the model wrote: text, and the ids it decoded without the end token."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class ScoredRow:
    """One question with its answers; a line of samples.jsonl.

    `score` is 1 or 0, or the token accuracy of a caption. The shuffled fields are None where no other picture exists.
    `cluster` joins rows about the same pictures. `cut` = the answer reached the length limit.
    """

    question_id: str
    task: str
    language: str
    cluster: str
    images: tuple[str, ...]
    wrong_images: tuple[str, ...] | None
    question: str
    truth: str
    reference: str
    answer: str
    extracted: str | None
    score: float
    token_f1: float | None
    shuffled_answer: str | None
    shuffled_score: float | None
    empty: bool
    cut: bool


def score_question(
    question: Question, real: Reply, shuffled: Reply | None, *, encode: Callable[[str], list[int]], max_new_tokens: int
) -> ScoredRow:
    """Compare the answers with the truth (a caption: with the reference, token by token).

    Args:
        encode: text -> token ids, as in training.
        max_new_tokens: the limit under which the answers were written.
    """
    reference_ids = encode(question.reference) if question.task == CAPTION else []

    def score(reply: Reply) -> float:
        if question.task == CAPTION:
            return token_accuracy(reply.token_ids, reference_ids)
        return float(is_correct(reply.text, question.truth))

    return ScoredRow(
        question_id=question.question_id,
        task=question.task,
        language=question.language,
        cluster=" ".join(question.image_sha256) or question.question_id,
        images=question.images,
        wrong_images=question.wrong_images,
        question="\n".join(message.content for message in question.messages),
        truth=question.truth,
        reference=question.reference,
        answer=real.text,
        extracted=extract_answer(real.text),
        score=score(real),
        token_f1=token_f1(real.token_ids, reference_ids) if question.task == CAPTION else None,
        shuffled_answer=shuffled.text if shuffled else None,
        shuffled_score=score(shuffled) if shuffled else None,
        empty=not real.text.strip(),
        cut=len(real.token_ids) >= max_new_tokens,
    )


def summarize(rows: Sequence[ScoredRow]) -> dict[str, Any]:
    """Figures per task, their macro means over all tasks but caption, captions, and slices by language.

    Intervals are 95 %, clustered by pictures. `n` is what was asked, `shuffled_n` what could also be asked with other
    pictures; a figure of nothing is None.
    """
    by_task: defaultdict[str, list[ScoredRow]] = defaultdict(list)
    by_language: defaultdict[str, list[ScoredRow]] = defaultdict(list)
    for row in rows:
        by_task[row.task].append(row)
        if row.task != CAPTION:
            by_language[row.language].append(row)
    captions = by_task.pop(CAPTION, [])
    macro, low, high = _macro(by_task)
    return {
        "macro": macro,
        "macro_low": low,
        "macro_high": high,
        "shuffled_macro": _shuffled_macro(by_task),
        "tasks": {task: _figures(group, "accuracy") for task, group in sorted(by_task.items())},
        "caption": _caption_figures(captions) if captions else None,
        "languages": {language: _figures(group, "accuracy") for language, group in sorted(by_language.items())},
    }


def to_json(row: ScoredRow) -> dict[str, Any]:
    """The row as plain JSON values."""
    return asdict(row)


def _figures(rows: Sequence[ScoredRow], name: str) -> dict[str, Any]:
    mean, low, high = mean_interval([row.score for row in rows], [row.cluster for row in rows])
    wrong = [row.shuffled_score for row in rows if row.shuffled_score is not None]
    return {
        "n": len(rows),
        "num_images": len({row.cluster for row in rows}),
        name: mean,
        "low": low,
        "high": high,
        "shuffled": sum(wrong) / len(wrong) if wrong else None,
        "shuffled_n": len(wrong),
        "num_empty": sum(row.empty for row in rows),
        "num_cut": sum(row.cut for row in rows),
    }


def _caption_figures(rows: Sequence[ScoredRow]) -> dict[str, Any]:
    overlaps = [row.token_f1 for row in rows if row.token_f1 is not None]
    exact = sum(row.score == 1.0 for row in rows) / len(rows)
    return _figures(rows, "token_accuracy") | {"token_f1": sum(overlaps) / len(rows), "exact": exact}


def _macro(by_task: dict[str, list[ScoredRow]]) -> tuple[float | None, float | None, float | None]:
    if not by_task:
        return None, None, None
    scores = {task: [row.score for row in rows] for task, rows in by_task.items()}
    return macro_interval(scores, {task: [row.cluster for row in rows] for task, rows in by_task.items()})


def _shuffled_macro(by_task: dict[str, list[ScoredRow]]) -> float | None:
    """Over the tasks that have a shuffled variant."""
    means = []
    for rows in by_task.values():
        scores = [row.shuffled_score for row in rows if row.shuffled_score is not None]
        if scores:
            means.append(sum(scores) / len(scores))
    return sum(means) / len(means) if means else None
