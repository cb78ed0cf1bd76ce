"""Which questions are asked of a checkpoint, and with which wrong picture the *shuffled* variant asks them.

The shuffled score is what a model reaches without seeing: the same questions and truths, but the pictures of other
questions of the same task. A score near it says that the pictures are not used. Pure functions over samples.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from minivlm.schema import Message, Sample
from minivlm.scoring.scorers import CAPTION_TOKENS, SHORT_ANSWER

CAPTION = "caption"
"""The task scored by tokens instead of by right or wrong."""


@dataclass(frozen=True)
class Question:
    """One held-out question.

    `messages` ends with the user turn. `reference` is the assistant turn of the data, `truth` the short answer.
    `wrong_images` / `wrong_sha256` replace the pictures in the shuffled variant; None where there is no other picture.
    `scorer` is a name of `minivlm.scoring.scorers`; `truths` are all accepted answers, the first being `truth`;
    `choices` the options of a multiple choice; `group` what figures are also given by (a category, MME's picture);
    `source` the benchmark, empty for the test split.
    """

    question_id: str
    task: str
    language: str
    images: tuple[str, ...]
    image_sha256: tuple[str, ...]
    messages: tuple[Message, ...]
    reference: str
    truth: str
    scorer: str = SHORT_ANSWER
    truths: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    group: str = ""
    source: str = ""
    wrong_images: tuple[str, ...] | None = None
    wrong_sha256: tuple[str, ...] | None = None

    @property
    def accepted(self) -> tuple[str, ...]:
        """All accepted answers."""
        return self.truths or (self.truth,)


def select_questions(samples: Iterable[Sample], *, max_per_task: int | None, seed: int) -> list[Question]:
    """Questions from test samples: every SFT task, and captions of any stage; each with its shuffled pictures.

    A sample counts when it ends with an assistant turn. Samples with equal pictures and prompt are asked once.

    Args:
        samples: of the test split.
        max_per_task: random choice of so many (by `seed`, hence the same for every checkpoint); None = all.
        seed: of the choice and of the shuffling.

    Returns:
        Sorted by task, then id.
    """
    by_task: defaultdict[str, dict[tuple[object, ...], Question]] = defaultdict(dict)
    for sample in samples:
        if (sample.stage != "sft" and sample.task != CAPTION) or sample.messages[-1].role != "assistant":
            continue
        reference = sample.messages[-1].content
        prompt = sample.messages[:-1]
        question = Question(
            question_id=sample.sample_id,
            task=sample.task,
            language=sample.language,
            images=sample.images,
            image_sha256=sample.image_sha256,
            messages=prompt,
            reference=reference,
            truth=sample.answer if sample.answer is not None else reference,
            scorer=CAPTION_TOKENS if sample.task == CAPTION else SHORT_ANSWER,
        )
        by_task[sample.task].setdefault((sample.image_sha256, prompt), question)
    chosen: list[Question] = []
    for task in sorted(by_task):
        questions = sorted(by_task[task].values(), key=lambda q: q.question_id)
        if max_per_task is not None and len(questions) > max_per_task:
            picked = random.Random(f"{seed}/{task}").sample(range(len(questions)), max_per_task)
            questions = [questions[i] for i in sorted(picked)]
        chosen += questions
    return shuffle_pictures(chosen, seed=seed)


def shuffle_pictures(questions: Sequence[Question], *, seed: int) -> list[Question]:
    """Give every question the pictures of another one of the same task and number of pictures.

    The distinct picture tuples of such a group are permuted along one random cycle, so nobody keeps its own and each
    is used as often as another was. A group with a single picture tuple, or without pictures, gets no variant.
    """
    groups: defaultdict[tuple[str, int], dict[tuple[str, ...], tuple[str, ...]]] = defaultdict(dict)
    for question in questions:
        groups[question.task, len(question.images)][question.image_sha256] = question.images
    wrong: dict[tuple[str, int], dict[tuple[str, ...], tuple[str, ...]]] = {}
    for (task, count), pictures in groups.items():
        keys = sorted(pictures)
        random.Random(f"{seed}/{task}/{count}").shuffle(keys)
        if count > 0 and len(keys) > 1:
            wrong[task, count] = dict(zip(keys, keys[1:] + keys[:1], strict=True))
    shuffled = []
    for question in questions:
        group = (question.task, len(question.images))
        if group not in wrong:
            shuffled.append(question)
            continue
        other = wrong[group][question.image_sha256]
        shuffled.append(replace(question, wrong_sha256=other, wrong_images=groups[group][other]))
    return shuffled
