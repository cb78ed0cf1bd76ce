"""ChatML: conversations to token ids and labels. The same functions prepare training, sampling and serving.

    <|im_start|>user\\n{content}<|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>\\n

Control tokens are placed by id and everything that people wrote is encoded as plain text in between, so no content can
forge a turn or a picture.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from minivlm.data.tokenizer import TURN_END, TURN_START, encode_text, token_id
from minivlm.schema import IMAGE_PLACEHOLDER, Message, count_placeholders

IGNORE = -100
ROLES = ("system", "user", "assistant")


def encode_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    num_image_tokens: int,
    *,
    num_images: int | None = None,
) -> tuple[list[int], list[int]]:
    """Turn a conversation into ids and labels; every assistant turn and its end token are learned.

    Args:
        messages: the turns in order. `<image>` in a system or user turn marks a picture; an assistant writes only
            text, so there it is text.
        num_image_tokens: placeholder tokens that one picture becomes.
        num_images: pictures that come with the conversation; checked where given.

    Returns:
        input_ids and labels, equally long. A label is the id itself or -100 (not learned); the loss shifts.

    Raises:
        ValueError: unknown role, no assistant turn, an empty answer, or placeholders unlike `num_images`.
    """
    if not any(message.role == "assistant" for message in messages):
        raise ValueError("the conversation has no assistant turn, so there is nothing to learn")
    _check_images(messages, num_images)
    input_ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        head, body, tail = _encode_turn(tokenizer, message, num_image_tokens)
        input_ids += head + body + tail
        if message.role == "assistant":
            if not message.content.strip():
                raise ValueError("an assistant turn is empty, so its end token alone would be learned")
            labels += [IGNORE] * len(head) + body + tail[:1] + [IGNORE] * (len(tail) - 1)
        else:
            labels += [IGNORE] * (len(head) + len(body) + len(tail))
    return input_ids, labels


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    num_image_tokens: int,
    *,
    num_images: int | None = None,
) -> list[int]:
    """Ids of a conversation that waits for the assistant: `encode_chat` up to where the next answer begins.

    Raises:
        ValueError: unknown role, no turn, the last turn is the assistant's, or placeholders unlike `num_images`.
    """
    if not messages or messages[-1].role == "assistant":
        raise ValueError("the last turn must be the user's, so that there is something to answer")
    _check_images(messages, num_images)
    input_ids: list[int] = []
    for message in messages:
        head, body, tail = _encode_turn(tokenizer, message, num_image_tokens)
        input_ids += head + body + tail
    return input_ids + _answer_head(tokenizer)


def turn_content(text: str, num_pictures: int) -> str:
    """Content of one turn: its pictures first, as in the training data, then its text.

    A literal `<image>` in the text would count as a picture, so it is set apart as `< image>`.
    """
    return f"{IMAGE_PLACEHOLDER}\n" * num_pictures + text.replace(IMAGE_PLACEHOLDER, "< image>")


def _check_images(messages: Sequence[Message], num_images: int | None) -> None:
    found = count_placeholders(messages)
    if num_images is not None and found != num_images:
        raise ValueError(
            f"{found} `{IMAGE_PLACEHOLDER}` placeholders for {num_images} pictures: write one `{IMAGE_PLACEHOLDER}` "
            "per picture, in a user turn"
        )


def _answer_head(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return [token_id(tokenizer, TURN_START), *encode_text(tokenizer, "assistant\n")]


def _encode_turn(
    tokenizer: PreTrainedTokenizerFast, message: Message, num_image_tokens: int
) -> tuple[list[int], list[int], list[int]]:
    """Ids before the content, of the content, and after it (the first one ends the turn).

    A user's header is encoded together with the text after it, as the rendered chat template would be, so that
    stock processors give the same ids.
    """
    if message.role not in ROLES:
        raise ValueError(f"unknown role `{message.role}`: use one of {', '.join(ROLES)}")
    tail = [token_id(tokenizer, TURN_END), *encode_text(tokenizer, "\n")]
    if message.role == "assistant":
        return _answer_head(tokenizer), encode_text(tokenizer, message.content), tail
    picture = [token_id(tokenizer, IMAGE_PLACEHOLDER)] * num_image_tokens
    first, *rest = f"{message.role}\n{message.content}".split(IMAGE_PLACEHOLDER)
    body = encode_text(tokenizer, first)
    for text in rest:
        body += picture + (encode_text(tokenizer, text) if text else [])
    return [token_id(tokenizer, TURN_START)], body, tail
