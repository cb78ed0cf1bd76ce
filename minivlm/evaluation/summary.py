"""From answers to scored rows, and from rows to the figures of one checkpoint. Pure functions.

How an answer is judged is the question's scorer (`minivlm.scoring.scorers`): of the test split by right or wrong, of
captions by how many of the reference's tokens are reproduced.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minivlm.evaluation.tasks import CAPTION, Question
from minivlm.scoring.scorers import CAPTION_TOKENS, SCORERS, Attempt, Verdict
from minivlm.scoring.statistics import macro_interval, mean_interval


@dataclass(frozen=True)
class Reply:
    """What the model wrote: text, and the ids it decoded without the end token."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class ScoredRow:
    """One question with its answers; a line of samples.jsonl.

    `score` lies in [0, 1] and is what `scorer` says, `metrics` are its further figures. The shuffled fields are None
    where no other picture exists. `cluster` joins rows about the same pictures. `cut` = the answer reached the length
    limit.
    """

    question_id: str
    task: str
    language: str
    cluster: str
    images: tuple[str, ...]
    wrong_images: tuple[str, ...] | None
    question: str
    truth: str
    truths: tuple[str, ...]
    choices: tuple[str, ...]
    scorer: str
    group: str
    source: str
    reference: str
    answer: str
    extracted: str | None
    score: float
    metrics: dict[str, float]
    token_f1: float | None
    shuffled_answer: str | None
    shuffled_score: float | None
    empty: bool
    cut: bool


def score_question(
    question: Question, real: Reply, shuffled: Reply | None, *, encode: Callable[[str], list[int]], max_new_tokens: int
) -> ScoredRow:
    """Judge the answers by the question's scorer.

    Args:
        encode: text -> token ids, as in training.
        max_new_tokens: the limit under which the answers were written.
    """
    reference_ids = tuple(encode(question.reference)) if question.scorer == CAPTION_TOKENS else ()

    def judge(reply: Reply) -> Verdict:
        attempt = Attempt(
            reply.text, question.accepted, question.choices, question.group, "", reply.token_ids, reference_ids
        )
        return SCORERS[question.scorer].judge(attempt)

    verdict = judge(real)
    return ScoredRow(
        question_id=question.question_id,
        task=question.task,
        language=question.language,
        cluster=" ".join(question.image_sha256) or question.question_id,
        images=question.images,
        wrong_images=question.wrong_images,
        question="\n".join(message.content for message in question.messages),
        truth=question.truth,
        truths=question.accepted,
        choices=question.choices,
        scorer=question.scorer,
        group=question.group,
        source=question.source,
        reference=question.reference,
        answer=real.text,
        extracted=verdict.extracted,
        score=verdict.score,
        metrics=dict(verdict.metrics),
        token_f1=verdict.metrics.get("token_f1"),
        shuffled_answer=shuffled.text if shuffled else None,
        shuffled_score=judge(shuffled).score if shuffled else None,
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
        "measure": _measure(rows),
        name: mean,
        "low": low,
        "high": high,
        "shuffled": sum(wrong) / len(wrong) if wrong else None,
        "shuffled_n": len(wrong),
        "metrics": _metrics(rows),
        "num_empty": sum(row.empty for row in rows),
        "num_cut": sum(row.cut for row in rows),
    }


def _measure(rows: Sequence[ScoredRow]) -> str:
    """What the mean of the scores is; `score` where it differs between rows."""
    measures = {SCORERS[row.scorer].measure for row in rows}
    return measures.pop() if len(measures) == 1 else "score"


def _metrics(rows: Sequence[ScoredRow]) -> dict[str, float]:
    """Further figures of rows that share a scorer; none of a slice through several."""
    scorers = {row.scorer for row in rows}
    if len(scorers) > 1:
        return {}
    attempts = [Attempt(row.answer, row.truths, row.choices, row.group, row.cluster) for row in rows]
    return SCORERS[scorers.pop()].total(attempts, [Verdict(row.score, row.extracted, row.metrics) for row in rows])


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
