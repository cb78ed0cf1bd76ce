"""Pairs for questions without a checkable truth: the model's own answer, and the same answer finished without seeing.

Dropout next-token prediction (arXiv:2411.10442, Sec. 3.2): the answer that was given with the picture is chosen; its
first half, continued by the same model without the picture and without the picture's placeholder, is rejected: what it
invents there is what it says blindly. Departures from InternVL's script: the cut is made between tokens (at spaces a
Chinese answer would have no first half), and continuations that say the same or nothing are dropped. Pure functions.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from minivlm.schema import IMAGE_PLACEHOLDER, Message

KIND = "dropout_ntp"
"""`kind` of these pairs."""

_BROKEN = "\ufffd"
"""What a character becomes of which only some bytes were decoded."""


def blind_messages(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The turns without any trace of pictures: placeholders go, with the line breaks that they leave at the ends."""
    return tuple(Message(turn.role, turn.content.replace(IMAGE_PLACEHOLDER, "").strip()) for turn in messages)


def cut_answer(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerFast, *, ratio: float) -> tuple[int, ...]:
    """The first `ratio` of an answer's tokens, at least one; fewer where the cut would split a character.

    Returns:
        Token ids; empty if the answer is too short to be cut.
    """
    length = max(1, int(len(token_ids) * ratio)) if len(token_ids) > 1 else 0
    while length and tokenizer.decode(list(token_ids[:length])).endswith(_BROKEN):
        length -= 1
    return tuple(token_ids[:length])


def judge_continuation(
    answer_ids: Sequence[int], prefix: Sequence[int], continuation: Sequence[int], tokenizer: PreTrainedTokenizerFast
) -> tuple[str | None, str]:
    """The rejected answer, or why there is none.

    Args:
        answer_ids: the whole chosen answer.
        prefix: its first tokens.
        continuation: what the model wrote behind them without the picture.

    Returns:
        (prefix and continuation as text, "") or (None, reason).
    """
    written, known = _text(tokenizer, [*prefix, *continuation]), _text(tokenizer, prefix)
    answer = _text(tokenizer, answer_ids)
    if not continuation or written == known:
        return None, "continuation_empty"
    if written == answer:
        return None, "continuation_identical"
    if _BROKEN in answer:
        return None, "open_answer_broken_text"
    if _BROKEN in written:
        return None, "continuation_broken_text"
    return written, ""


def _text(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    return text.strip()
