"""The table of scorers: by name, how one answer is judged and what figures a set of answers has. Pure.

Called by evaluation for every question (`Question.scorer`). A score lies in [0, 1]; figures of a whole set, like CIDEr,
need not. docs/evaluation.md says what each scorer is equal to.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from minivlm.scoring.answers import extract_answer, is_correct
from minivlm.scoring.metrics import token_accuracy, token_f1
from minivlm.scoring.yes_no import says, yes_no_figures, yes_or_no

SHORT_ANSWER = "short_answer"
CAPTION_TOKENS = "caption_tokens"


@dataclass(frozen=True)
class Attempt:
    """One answer and what it is compared with.

    `truths` are all accepted answers (of a multiple choice: the letter), `choices` the texts of the options, `group`
    what questions belong together by, `cluster` the pictures. The ids are those of answer and reference, as the model's
    tokenizer writes them; only `caption_tokens` looks at them.
    """

    answer: str
    truths: tuple[str, ...]
    choices: tuple[str, ...] = ()
    group: str = ""
    cluster: str = ""
    answer_ids: tuple[int, ...] = ()
    reference_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """`score` in [0, 1]; `extracted`, what of the answer was compared (None: all of it); further figures of the row."""

    score: float
    extracted: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scorer:
    """`measure` names what the mean of the scores is; `total` gives further figures of at least one judged answer."""

    measure: str
    judge: Callable[[Attempt], Verdict]
    total: Callable[[Sequence[Attempt], Sequence[Verdict]], dict[str, float]]


def _judge_short(attempt: Attempt) -> Verdict:
    right = any(is_correct(attempt.answer, truth) for truth in attempt.truths)
    return Verdict(float(right), extract_answer(attempt.answer))


def _total_short(attempts: Sequence[Attempt], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Where every truth is yes or no, the figures of yes/no questions; else none."""
    truths = [yes_or_no(attempt.truths[0]) for attempt in attempts]
    known = [truth for truth in truths if truth is not None]
    if len(known) < len(truths):
        return {}
    return yes_no_figures([says(attempt.answer, attempt.truths[0]) for attempt in attempts], known)


def _judge_tokens(attempt: Attempt) -> Verdict:
    overlap = token_f1(attempt.answer_ids, attempt.reference_ids)
    score = token_accuracy(attempt.answer_ids, attempt.reference_ids)
    return Verdict(score, extract_answer(attempt.answer), {"token_f1": overlap})


def _no_total(attempts: Sequence[Attempt], verdicts: Sequence[Verdict]) -> dict[str, float]:
    return {}


SCORERS: dict[str, Scorer] = {
    SHORT_ANSWER: Scorer("accuracy", _judge_short, _total_short),
    CAPTION_TOKENS: Scorer("token_accuracy", _judge_tokens, _no_total),
}
