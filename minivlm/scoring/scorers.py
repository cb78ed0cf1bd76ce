"""The table of scorers: by name, how one answer is judged and what figures a set of answers has. Pure.

Called by evaluation for every question (`Question.scorer`). A score lies in [0, 1]; figures of a whole set, like CIDEr,
need not. docs/evaluation.md says what each scorer is equal to.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from minivlm.scoring import yes_no
from minivlm.scoring.answers import extract_answer, is_correct
from minivlm.scoring.captions import bleu_4, cider_d, rouge_l
from minivlm.scoring.chair import chair_counts, chair_figures, coco_objects, is_miniworld_caption, miniworld_objects
from minivlm.scoring.extraction import (
    LETTERS,
    choice_letter,
    contains_answer,
    contains_formula,
    final_answer,
    is_exact,
    is_letter,
    is_math_answer,
    starts_with_letter,
)
from minivlm.scoring.metrics import token_accuracy, token_f1
from minivlm.scoring.text_metrics import VQA_MATCHES, anls, relaxed_match, vqa_accuracy

SHORT_ANSWER = "short_answer"
CAPTION_TOKENS = "caption_tokens"
CAPTION_SCORERS = (CAPTION_TOKENS, "captions")
"""Their score is a likeness; tasks with them stay out of the macro mean."""


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


Judge = Callable[[Attempt], Verdict]
Total = Callable[[Sequence[Attempt], Sequence[Verdict]], dict[str, float]]
Fit = Callable[[Sequence[str], Sequence[str]], str | None]


def _has_truth(truths: Sequence[str], choices: Sequence[str]) -> str | None:
    return None if truths and all(truth.strip() for truth in truths) else "an empty true answer"


def _has_annotators(truths: Sequence[str], choices: Sequence[str]) -> str | None:
    if len(truths) <= VQA_MATCHES:
        return f"{len(truths)} answers: VQA accuracy compares each with {VQA_MATCHES} others at least"
    return _has_truth(truths, choices)


def _is_yes_no(truths: Sequence[str], choices: Sequence[str]) -> str | None:
    is_fit = len(truths) == 1 and truths[0] in ("yes", "no")
    return None if is_fit else f"the true answer {' / '.join(truths)[:40]!r} is not yes or no"


def _has_letter(truths: Sequence[str], choices: Sequence[str]) -> str | None:
    letters = LETTERS[: len(choices)]
    if not 2 <= len(choices) <= len(LETTERS):
        return f"{len(choices)} options"
    is_fit = len(truths) == 1 and len(truths[0]) == 1 and truths[0] in letters
    return None if is_fit else f"the true answer {' / '.join(truths)[:40]!r} is none of {letters[0]} to {letters[-1]}"


def _has_choice(truths: Sequence[str], choices: Sequence[str]) -> str | None:
    if choices and truths[0] not in choices:
        return f"the true answer {truths[0][:40]!r} is none of the {len(choices)} choices"
    return "too many choices" if len(choices) > len(LETTERS) else _has_truth(truths, choices)


def _nothing_more(attempts: Sequence[Attempt], verdicts: Sequence[Verdict]) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Scorer:
    """`measure` names what the mean of the scores is; `total` gives further figures of at least one judged answer;
    `unfit` says why a question with such truths and choices cannot be judged (None: it can)."""

    measure: str
    judge: Judge
    total: Total = _nothing_more
    unfit: Fit = _has_truth


def _judge_short(attempt: Attempt) -> Verdict:
    right = any(is_correct(attempt.answer, truth) for truth in attempt.truths)
    return Verdict(float(right), extract_answer(attempt.answer))


def _total_short(attempts: Sequence[Attempt], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Where every truth is yes or no, the figures of yes/no questions; else none."""
    truths = [yes_no.yes_or_no(attempt.truths[0]) for attempt in attempts]
    known = [truth for truth in truths if truth is not None]
    if len(known) < len(truths):
        return {}
    return yes_no.yes_no_figures([yes_no.says(attempt.answer, attempt.truths[0]) for attempt in attempts], known)


def _judge_tokens(attempt: Attempt) -> Verdict:
    """CHAIR's counts where the reference is a caption of the miniworld."""
    figures = {"token_f1": token_f1(attempt.answer_ids, attempt.reference_ids)}
    if is_miniworld_caption(attempt.truths[0]):
        figures |= chair_counts(miniworld_objects(attempt.answer), miniworld_objects(attempt.truths[0]))
    return Verdict(token_accuracy(attempt.answer_ids, attempt.reference_ids), extract_answer(attempt.answer), figures)


def _total_tokens(attempts: Sequence[Attempt], verdicts: Sequence[Verdict]) -> dict[str, float]:
    return chair_figures([verdict.metrics for verdict in verdicts])


def _judge_text(metric: Callable[[str, Sequence[str]], float], attempt: Attempt) -> Verdict:
    """The final answer where the text marks one, else all of it. A marker with nothing behind it is all of it too."""
    extracted = final_answer(attempt.answer)
    given = attempt.answer.strip() if extracted is None else extracted
    return Verdict(float(metric(given, attempt.truths)), extracted) if given else Verdict(0.0)


def _relaxed(text: str, truths: Sequence[str]) -> float:
    return float(any(relaxed_match(text, truth) for truth in truths))


def _judge_choice(attempt: Attempt) -> Verdict:
    letter, truth = choice_letter(attempt.answer, attempt.choices), attempt.truths[0]
    own_rules = {
        "letter_only": float(is_letter(attempt.answer, truth)),
        "first_letter": float(starts_with_letter(attempt.answer, truth)),
    }
    return Verdict(float(letter == truth), letter, own_rules)


def _total_choice(attempts: Sequence[Attempt], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Accuracy by the benchmarks' own rules, of each group, and the mean over groups (MMStar's figure)."""
    figures = {
        rule: sum(verdict.metrics[rule] for verdict in verdicts) / len(verdicts)
        for rule in ("letter_only", "first_letter")
    }
    unclear = sum(verdict.extracted is None for verdict in verdicts) / len(verdicts)
    return figures | {"unclear": unclear} | _by_group(attempts, verdicts)


def _by_group(attempts: Sequence[Attempt], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Mean score of each group, and `group_mean`, the plain mean of these; nothing where there are no groups."""
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for attempt, verdict in zip(attempts, verdicts, strict=True):
        scores[attempt.group].append(verdict.score)
    if set(scores) == {""}:
        return {}
    means = {f"group/{name}": sum(values) / len(values) for name, values in sorted(scores.items())}
    return means | {"group_mean": sum(means.values()) / len(means)}


def _judge_math(attempt: Attempt) -> Verdict:
    right = is_math_answer(attempt.answer, attempt.truths[0], attempt.choices)
    extracted = choice_letter(attempt.answer, attempt.choices) if attempt.choices else final_answer(attempt.answer)
    return Verdict(float(right), extracted)


def _concluded(answer: str) -> str:
    """What a chain of thought ends with; else all of it."""
    return extract_answer(answer) or answer


def _judge_contained(rule: Callable[[str, Sequence[str]], bool], attempt: Attempt) -> Verdict:
    return Verdict(float(rule(_concluded(attempt.answer), attempt.truths)), extract_answer(attempt.answer))


def _judge_yes_no(read: Callable[[str], bool | None], attempt: Attempt) -> Verdict:
    said = read(_concluded(attempt.answer))
    extracted = None if said is None else "yes" if said else "no"
    return Verdict(float(said == (attempt.truths[0] == "yes")), extracted)


def _total_pope(attempts: Sequence[Attempt], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Figures by the strict reading, the same as loose/.. by InternVL's, and F1 of each group by both."""
    truths = [attempt.truths[0] == "yes" for attempt in attempts]
    strict: list[bool | None] = [yes_no.says_strictly(_concluded(attempt.answer)) for attempt in attempts]
    loose: list[bool | None] = [yes_no.says_loosely(_concluded(attempt.answer)) for attempt in attempts]
    figures: dict[str, float] = {}
    for prefix, said in (("", strict), ("loose/", loose)):
        figures |= {prefix + name: value for name, value in yes_no.yes_no_figures(said, truths).items()}
        for group in sorted({attempt.group for attempt in attempts} - {""}):
            places = [place for place, attempt in enumerate(attempts) if attempt.group == group]
            own = yes_no.yes_no_figures([said[place] for place in places], [truths[place] for place in places])
            figures[f"{prefix}f1/{group}"] = own["f1"]
    return figures


def _total_mme(attempts: Sequence[Attempt], verdicts: Sequence[Verdict]) -> dict[str, float]:
    said = [yes_no.says_at_first(_concluded(attempt.answer)) for attempt in attempts]
    figures = yes_no.yes_no_figures(said, [attempt.truths[0] == "yes" for attempt in attempts])
    scores = [verdict.score for verdict in verdicts]
    return figures | yes_no.mme_figures(scores, [attempt.group for attempt in attempts])


def _judge_caption(attempt: Attempt) -> Verdict:
    """ROUGE-L, which one caption has, and CHAIR's counts; the truth is what any reference names."""
    named = {name for truth in attempt.truths for name in coco_objects(truth)}
    return Verdict(rouge_l(attempt.answer, attempt.truths), None, chair_counts(coco_objects(attempt.answer), named))


def _total_caption(attempts: Sequence[Attempt], verdicts: Sequence[Verdict]) -> dict[str, float]:
    answers, truths = [attempt.answer for attempt in attempts], [attempt.truths for attempt in attempts]
    cider = cider_d(answers, truths)
    corpus = {"cider": sum(cider) / len(cider), "bleu_4": bleu_4(answers, truths)}
    return corpus | chair_figures([verdict.metrics for verdict in verdicts])


SCORERS: dict[str, Scorer] = {
    SHORT_ANSWER: Scorer("accuracy", _judge_short, _total_short),
    CAPTION_TOKENS: Scorer("token_accuracy", _judge_tokens, _total_tokens),
    "exact": Scorer("exact_match", partial(_judge_text, is_exact), _by_group),
    "relaxed": Scorer("relaxed_accuracy", partial(_judge_text, _relaxed), _by_group),
    "anls": Scorer("anls", partial(_judge_text, anls), _by_group),
    "vqa": Scorer("vqa_accuracy", partial(_judge_text, vqa_accuracy), _by_group, _has_annotators),
    "choice": Scorer("accuracy", _judge_choice, _total_choice, _has_letter),
    "math": Scorer("accuracy", _judge_math, _by_group, _has_choice),
    "contains": Scorer("accuracy", partial(_judge_contained, contains_answer), _by_group),
    "contains_formula": Scorer("accuracy", partial(_judge_contained, contains_formula), _by_group),
    "pope": Scorer("accuracy", partial(_judge_yes_no, yes_no.says_strictly), _total_pope, _is_yes_no),
    "mme": Scorer("accuracy", partial(_judge_yes_no, yes_no.says_at_first), _total_mme, _is_yes_no),
    "captions": Scorer("rouge_l", _judge_caption, _total_caption),
}
