"""The further ways in which a question is asked (`evaluation.variants`), and which questions a way does not suit.

| variant | what is put to the model |
|---|---|
| `shuffled` | the same question with the pictures of another one of its task |
| `no_image` | without its pictures and their placeholders |
| `jpeg`, `blur`, `rotate`, `occlude` | its pictures made worse, as `minivlm.evaluation.robustness` says |
| `direct` | a request for a chain of thought becomes one for a short answer; what carries none is direct as it is |
| `cot` | wrapped into a request for a chain of thought, in its language; not captions, nor what carries one already |
| `few_shot` | behind `evaluation.num_shots` training examples of its task and language, with their pictures |

Pure functions; the plain question is `real` and no variant.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from minivlm.config.run import Variant
from minivlm.evaluation.shots import Pools, add_shots
from minivlm.evaluation.tasks import Question
from minivlm.schema import IMAGE_PLACEHOLDER, Message
from minivlm.scoring.prompts import SHORT_INSTRUCTIONS, cot_prompt, direct_prompt, strip_instruction
from minivlm.scoring.scorers import CAPTION_SCORERS

REAL = "real"
ROBUSTNESS = ("jpeg", "blur", "rotate", "occlude")
"""Variants that show worse pictures."""

Skipped = dict[str, dict[str, int]]
"""Task -> reason -> questions that a variant does not ask."""


@dataclass(frozen=True)
class Asked:
    """A question as it is put: the turns, and the pictures in the order of their placeholders."""

    messages: tuple[Message, ...]
    image_sha256: tuple[str, ...]


@dataclass(frozen=True)
class Material:
    """What some variants need besides the question. `worse`: variant -> digest of a picture -> that of its worse form;
    `pools`: training examples; `seed` and the question's id decide which `num_shots` of them stand before it."""

    worse: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    pools: Pools = field(default_factory=dict)
    num_shots: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Variants:
    """How all questions are asked, by the questions' numbers; and what each variant leaves out."""

    asked: dict[str, dict[int, Asked]]
    skipped: dict[str, Skipped]


def ask_all(questions: Sequence[Question], variants: Sequence[Variant], material: Material) -> Variants:
    """Every question as it is, and in each of the variants that suit it."""
    asked: dict[str, dict[int, Asked]] = {REAL: {n: Asked(q.messages, q.image_sha256) for n, q in enumerate(questions)}}
    skipped: dict[str, Skipped] = {}
    for variant in dict.fromkeys(variants):
        put = [vary(question, variant, material) for question in questions]
        asked[variant] = {number: way for number, way in enumerate(put) if isinstance(way, Asked)}
        reasons: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for question, way in zip(questions, put, strict=True):
            if isinstance(way, str):
                reasons[question.task][way] += 1
        skipped[variant] = {task: dict(counts) for task, counts in sorted(reasons.items())}
    return Variants(asked, skipped)


def vary(question: Question, variant: Variant, material: Material) -> Asked | str:
    """One question in one variant, or why that variant does not suit it."""
    if variant == "shuffled":
        if question.wrong_sha256 is None:
            return "no other picture to show"
        return Asked(question.messages, question.wrong_sha256)
    if variant in ("no_image", *ROBUSTNESS) and not question.images:
        return "shows no picture"
    if variant == "no_image":
        return _without_pictures(question)
    if variant in ROBUSTNESS:
        worse = material.worse[variant]
        return Asked(question.messages, tuple(worse[digest] for digest in question.image_sha256))
    if variant == "few_shot":
        shots = add_shots(question, material.pools, material.num_shots, material.seed)
        return shots if isinstance(shots, str) else Asked(*shots)
    text = question.messages[-1].content
    if variant == "direct":
        if not asks_for_steps(text):
            return "asks for no chain of thought"
        return _reworded(question, direct_prompt(text, question.language))
    if question.scorer in CAPTION_SCORERS:
        return "a caption has no final answer"
    if asks_for_steps(text):
        return "asks for a chain of thought already"
    return _reworded(question, cot_prompt(text, "zh" if question.language == "zh" else "en"))


def asks_for_steps(text: str) -> bool:
    """Whether a question carries a request for a chain of thought that `strip_instruction` knows."""
    is_short = text.rstrip().endswith(SHORT_INSTRUCTIONS)
    return not is_short and _letters(strip_instruction(text)) != _letters(text)


def _letters(text: str) -> str:
    return "".join(text.replace(IMAGE_PLACEHOLDER, "").split())


def _reworded(question: Question, text: str) -> Asked:
    return Asked((*question.messages[:-1], replace(question.messages[-1], content=text)), question.image_sha256)


def _without_pictures(question: Question) -> Asked:
    turns = [
        replace(turn, content=turn.content.replace(f"{IMAGE_PLACEHOLDER}\n", "").replace(IMAGE_PLACEHOLDER, ""))
        if turn.role != "assistant"
        else turn
        for turn in question.messages
    ]
    return Asked(tuple(turns), ())
