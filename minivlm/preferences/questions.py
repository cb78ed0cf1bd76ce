"""Which questions a model is asked for preference pairs, and in which words: training rows only, each once."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from minivlm.config import Config, ConfigError
from minivlm.data.errors import DataError
from minivlm.data.pipeline import iter_training_rows
from minivlm.data.samples import LoadedSample
from minivlm.data.settings import sources
from minivlm.layout import samples_dir
from minivlm.preferences.pairs import Asked
from minivlm.schema import Message, Sample
from minivlm.scoring.answers import MARKER
from minivlm.scoring.prompts import Style, cot_prompt

_STYLES: dict[str, tuple[Style, Style]] = {
    "final_answer": ("en", "zh"),
    "boxed": ("boxed_en", "boxed_zh"),
    "think": ("think_en", "think_zh"),
}
"""preferences.prompt_style -> the style of English rows (and all others), and of Chinese ones."""


@dataclass(frozen=True)
class Prompt:
    """A single-turn question as it is asked: `messages` are what the model reads, `file` is where the row stands.

    `asked` says how answers are checked; None = an open question, whose answers cannot be.
    """

    sample: Sample
    messages: tuple[Message, ...]
    file: str
    asked: Asked | None

    @property
    def question(self) -> str:
        """The user's turn, with its placeholders."""
        return self.messages[-1].content


@dataclass(frozen=True)
class Questions:
    """What is asked: questions with a known answer, open ones, and why others were left out."""

    known: list[Prompt]
    open: list[Prompt]
    skipped: Counter[str]


def select_questions(config: Config) -> Questions:
    """Questions to sample answers for, each kind by id and at most preferences.max_questions (a seeded choice).

    Those with a known answer are training rows of `prompts`, else of SFT; open ones are rows of the tasks in
    preferences.dropout_ntp_tasks, of the first stage among prompts, SFT and pretrain that has any.

    Raises:
        DataError: none is left.
        ConfigError: sources with one file ask for different verifiers, or no row has a task that was named.
    """
    skipped: Counter[str] = Counter()
    tasks = config.preferences.dropout_ntp_tasks
    for stage in ("prompts", "sft"):
        rows = list(iter_training_rows(config, stage, once=True))
        if rows:
            break
    verifiers = _verifiers(config, stage)
    known = [row for row in rows if row[0].task not in tasks]
    prompts = [
        _ask(config, sample, file, verifiers.get(file, "exact"))
        for sample, file in _choose(config, known, skipped, need_answer=True)
    ]
    opened = _open_rows(config) if tasks else []
    questions = [
        Prompt(sample, _user_turns(sample), file, None)
        for sample, file in _choose(config, opened, skipped, need_answer=False)
    ]
    if not prompts and not questions:
        raise DataError(
            f"None of the {len(rows)} training questions in {samples_dir(config)} can be verified "
            f"({dict(skipped)}). Give rows an `answer`, list a source under data.prompts, name open tasks in "
            "preferences.dropout_ntp_tasks, or bring pairs under data.mpo"
        )
    return Questions(prompts, questions, skipped)


def stable_number(text: str) -> int:
    """A 31-bit number that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def _choose(
    config: Config, rows: Iterable[LoadedSample], skipped: Counter[str], *, need_answer: bool
) -> list[tuple[Sample, str]]:
    limit = config.preferences.max_questions
    chosen: dict[tuple[Any, ...], tuple[Sample, str]] = {}
    for sample, file, _ in sorted(rows, key=lambda row: stable_number(f"{config.seed}/{row[0].sample_id}")):
        turns = _user_turns(sample)
        if need_answer and sample.answer is None:
            skipped["no_known_answer"] += 1
        elif len(turns) != 1 or sample.messages[0].role != "user":
            skipped["not_single_turn"] += 1
        elif (sample.image_sha256, turns[0]) in chosen:
            skipped["asked_twice"] += 1
        elif limit is not None and len(chosen) >= limit:
            skipped["over_max_questions"] += 1
        elif not need_answer and not sample.image_sha256:
            skipped["open_without_picture"] += 1
        else:
            chosen[sample.image_sha256, turns[0]] = (sample, file)
    return sorted(chosen.values(), key=lambda item: item[0].sample_id)


def _ask(config: Config, sample: Sample, file: str, verifier: str) -> Prompt:
    settings = config.preferences
    reasoned = any(MARKER.search(message.content) for message in sample.messages)
    turns = _user_turns(sample)
    style: Style | None = None
    if settings.prompt_style != "as_is":
        style = _STYLES[settings.prompt_style][sample.language == "zh"]
        turns = (Message("user", cot_prompt(turns[0].content, style)),)
    assert sample.answer is not None
    return Prompt(sample, turns, file, Asked(sample.answer, reasoned, style, verifier, settings.fix_answers))


def _open_rows(config: Config) -> list[LoadedSample]:
    tasks = config.preferences.dropout_ntp_tasks
    seen: set[str] = set()
    for stage in ("prompts", "sft", "pretrain"):
        found = []
        for row in iter_training_rows(config, stage, once=True):
            seen.add(row[0].task)
            if row[0].task in tasks:
                found.append(row)
        if found:
            return found
    raise ConfigError(
        f"preferences.dropout_ntp_tasks={list(tasks)}: no training row has such a task. "
        f"Type some of: {', '.join(sorted(seen))}"
    )


def _verifiers(config: Config, stage: str) -> dict[str, str]:
    """Verifier of each file of rows; the drawn miniworld has none of its own."""
    given = getattr(config.data, stage)
    found: dict[str, str] = {}
    for source in sources(config) if given else ():
        if source.stage == stage:
            verifier = given[source.place].verifier
            if found.setdefault(source.path, verifier) != verifier:
                raise ConfigError(
                    f"{source.path} is listed twice in data.{stage}, with verifier {found[source.path]} and with "
                    f"{verifier}: give both the same"
                )
    return found


def _user_turns(sample: Sample) -> tuple[Message, ...]:
    return tuple(message for message in sample.messages if message.role == "user")
