"""The rows that flow through the system, as plain dataclasses (no Ray, no pydantic)."""

from collections.abc import Sequence
from dataclasses import dataclass

CORRECTNESS_KIND = "correctness"
"""`kind` of preference pairs of a right and a wrong answer."""

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
"""Of a row in a data file; a sample has one `<image>` for each of the frames instead."""


@dataclass(frozen=True)
class Message:
    """One turn. `content` marks each picture's place with `<image>`."""

    role: str
    content: str


def count_placeholders(messages: Sequence[Message]) -> int:
    """Pictures that the system and user turns ask for."""
    return sum(message.content.count(IMAGE_PLACEHOLDER) for message in messages if message.role != "assistant")


@dataclass(frozen=True)
class Sample:
    """One validated conversation with its pictures.

    `images` are absolute paths in the order of the placeholders and `image_sha256` the digests of their bytes.
    `answer` is the known truth, where there is one: the short form, without the chain of thought.
    """

    sample_id: str
    images: tuple[str, ...]
    image_sha256: tuple[str, ...]
    messages: tuple[Message, ...]
    stage: str
    split: str
    task: str
    language: str = "en"
    answer: str | None = None


@dataclass(frozen=True)
class PreferencePair:
    """One question with a better and a worse answer; the log-probabilities are sums over answer tokens, in nats.

    `reference` names the checkpoint that computed them; None until it did.
    """

    pair_id: str
    images: tuple[str, ...]
    image_sha256: tuple[str, ...]
    question: str
    chosen: str
    rejected: str
    answer: str | None = None
    kind: str = CORRECTNESS_KIND
    ref_chosen_logps: float | None = None
    ref_rejected_logps: float | None = None
    reference: str | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that was set aside: where it stands and why."""

    file: str
    row: int
    reason: str
