"""From answers to scored rows, and from rows to the figures of one checkpoint. Pure functions.

How an answer is judged is the question's scorer (`minivlm.scoring.scorers`): of the test split by right or wrong, of
captions by how many of the reference's tokens are reproduced.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minivlm.evaluation.tasks import CAPTION, Question
from minivlm.scoring.scorers import CAPTION_SCORERS, CAPTION_TOKENS, SCORERS, Attempt, Verdict
from minivlm.scoring.statistics import macro_interval, mean_interval, smallest_difference, standard_error


@dataclass(frozen=True)
class Reply:
    """What the model wrote: text, and the ids it decoded without the end token."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class ScoredRow:
    """One question with its answers; a line of samples.jsonl.

    `score` lies in [0, 1] and is what `scorer` says, `metrics` are its further figures. `variants` has {answer,
    extracted, score} of each variant that suits the question. `cluster` joins rows about the same pictures. `cut` = the
    answer reached the length limit.
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
    variants: dict[str, dict[str, Any]]
    empty: bool
    cut: bool


def score_question(
    question: Question,
    real: Reply,
    variants: Mapping[str, Reply],
    *,
    encode: Callable[[str], list[int]],
    max_new_tokens: int,
) -> ScoredRow:
    """Judge the answers by the question's scorer.

    Args:
        variants: what was written to the question's variants.
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
        variants={name: _variant_row(reply, judge(reply)) for name, reply in variants.items()},
        empty=not real.text.strip(),
        cut=len(real.token_ids) >= max_new_tokens,
    )


def _variant_row(reply: Reply, verdict: Verdict) -> dict[str, Any]:
    return {"answer": reply.text, "extracted": verdict.extracted, "score": verdict.score}


def summarize(rows: Sequence[ScoredRow], skipped: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, Any]:
    """Figures per task, their macro means over all tasks but captions, captions, and slices by language.

    Intervals are 95 %, clustered by pictures; `error` is the clustered standard error, `minimum_difference` what a
    second run with independent mistakes would have to differ by to be told apart (80 % power, 5 % level). A figure of
    nothing is None. `variants` has each variant's macro mean over the tasks that it was asked of, how many questions
    that were, and what it left out. `macro_questions` counts those behind the macro mean.

    Args:
        skipped: variant -> task -> reason -> questions that it was not asked of.
    """
    by_task: defaultdict[str, list[ScoredRow]] = defaultdict(list)
    by_language: defaultdict[str, list[ScoredRow]] = defaultdict(list)
    for row in rows:
        by_task[row.task].append(row)
        if row.scorer not in CAPTION_SCORERS:
            by_language[row.language].append(row)
    captions = by_task.pop(CAPTION, [])
    answered = {task: group for task, group in by_task.items() if group[0].scorer not in CAPTION_SCORERS}
    macro, low, high = _macro(answered)
    variants = {
        name: {
            "macro": _variant_macro(answered, name),
            "n": sum(name in row.variants for row in rows),
            "skipped": reasons,
        }
        for name, reasons in skipped.items()
    }
    return {
        "macro": macro,
        "macro_low": low,
        "macro_high": high,
        "macro_questions": sum(len(group) for group in answered.values()),
        "shuffled_macro": _variant_macro(answered, "shuffled"),
        "variants": variants,
        "tasks": {task: _figures(group, "accuracy") for task, group in sorted(by_task.items())},
        "caption": _caption_figures(captions) if captions else None,
        "languages": {language: _figures(group, "accuracy") for language, group in sorted(by_language.items())},
    }


def to_json(row: ScoredRow) -> dict[str, Any]:
    """The row as plain JSON values."""
    return asdict(row)


def _figures(rows: Sequence[ScoredRow], name: str) -> dict[str, Any]:
    scores, clusters = [row.score for row in rows], [row.cluster for row in rows]
    mean, low, high = mean_interval(scores, clusters)
    error = standard_error(scores, clusters)
    return {
        "n": len(rows),
        "num_images": len(set(clusters)),
        "measure": _measure(rows),
        name: mean,
        "low": low,
        "high": high,
        "error": error,
        "minimum_difference": smallest_difference(math.sqrt(2) * error),
        "variants": {variant: _variant(rows, variant) for variant in {v: None for row in rows for v in row.variants}},
        "metrics": _metrics(rows),
        "num_empty": sum(row.empty for row in rows),
        "num_cut": sum(row.cut for row in rows),
    }


def _variant(rows: Sequence[ScoredRow], name: str) -> dict[str, Any]:
    asked = [row for row in rows if name in row.variants]
    mean, low, high = mean_interval([row.variants[name]["score"] for row in asked], [row.cluster for row in asked])
    return {"accuracy": mean, "n": len(asked), "low": low, "high": high}


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


def _variant_macro(by_task: dict[str, list[ScoredRow]], name: str) -> float | None:
    """Over the tasks that the variant was asked of."""
    scores = [[row.variants[name]["score"] for row in rows if name in row.variants] for rows in by_task.values()]
    means = [sum(values) / len(values) for values in scores if values]
    return sum(means) / len(means) if means else None
