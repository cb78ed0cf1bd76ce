"""Raw rows -> samples and pairs, or the reason why not. Pictures are still names or bytes here, and not opened.

Called in Ray Data tasks by `minivlm.data.validate`; `minivlm.data.formats` knows the formats.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from minivlm.data.errors import RowError
from minivlm.data.formats import Row, normalize
from minivlm.schema import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Message, PreferencePair, Sample

SPLITS = ("train", "val", "test")
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}

CHINESE = re.compile("[\u4e00-\u9fff]")


def parse_row(raw: Any, columns: Mapping[str, str]) -> Row:
    """The row in the shape of `minivlm.data.formats`.

    Args:
        columns: keys of the row that the formats call otherwise -> their name there.

    Raises:
        RowError: as `decode_row`, the row has no known format, or text that is not Unicode.
    """
    row = decode_row(raw)
    named = {columns[key]: value for key, value in row.items() if key in columns}
    found = normalize({key: value for key, value in row.items() if key not in columns and key not in named} | named)
    try:
        json.dumps(found, ensure_ascii=False, default=lambda _: None).encode()
    except UnicodeEncodeError:
        raise RowError("half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise RowError("nested too deeply") from None
    return found


def decode_row(raw: Any) -> Row:
    """A row as its file has it, as a dict.

    Raises:
        RowError: the line is not JSON, or the row is not an object.
    """
    if isinstance(raw, RowError):
        raise raw
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw)
        except json.JSONDecodeError as error:
            raise RowError(f"not JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, deep nesting
            raise RowError(f"not JSON: {type(error).__name__}") from None
    if not isinstance(raw, dict):
        raise RowError(f"a row must be an object with keys, not {type(raw).__name__}")
    return raw


def to_sample(row: Row, *, stage: str, split: str, task: str, default_id: str) -> Sample:
    """A row of `parse_row` as a sample whose pictures are still to be opened: `images` and `image_sha256` are empty.

    Args:
        split: of rows that name none; `auto` stays as it is until the picture's digest is known.
        task: of rows that name none.

    Raises:
        RowError: no conversation, an empty answer, placeholders unlike the images, or a field of the wrong kind.
    """
    if "conversations" not in row:
        raise RowError("a preference row: list its file under data.mpo")
    messages = _messages(row["conversations"])
    answer = text_field(row, "answer")
    if stage == "prompts":
        if not answer:
            raise RowError("a prompt needs the true `answer`")
    elif not any(message.role == "assistant" for message in messages):
        raise RowError("the conversation has no answer (`from`: `gpt`)")
    for message in messages:
        if message.role == "assistant" and not message.content.strip():
            raise RowError("an empty answer")
    _check_placeholders([m.content for m in messages if m.role != "assistant"], len(row["images"]))
    chosen_split = row.get("split", split)
    if chosen_split not in (*SPLITS, "auto"):
        raise RowError(f"`split` is {str(chosen_split)[:40]!r}, not one of {', '.join(SPLITS)}")
    return Sample(
        sample_id=text_field(row, "id") or default_id,
        images=(),
        image_sha256=(),
        messages=messages,
        stage=stage,
        split=chosen_split,
        task=text_field(row, "task") or task,
        language=_language(row, messages),
        answer=answer,
    )


def to_pair(row: Row, *, default_id: str) -> PreferencePair:
    """A row of `parse_row` as a pair, pictures as in `to_sample`. A question without placeholders gets them in front.

    Raises:
        RowError: question, chosen or rejected is missing or empty, equal answers, or placeholders unlike images.
    """
    if "rejected" not in row:
        raise RowError("no `rejected` answer, so no preference")
    if row.get("split", "train") not in ("train", "auto"):
        raise RowError(f"`split` is {str(row['split'])[:40]!r}: pairs are for training, so this one is left out")
    texts = {}
    for key in ("question", "chosen", "rejected"):
        texts[key] = text_field(row, key) or ""
        if not texts[key].strip():
            raise RowError(f"`{key}` is empty" if key == "question" else f"an empty answer (`{key}`)")
    if texts["chosen"].strip() == texts["rejected"].strip():
        raise RowError("chosen and rejected are the same")
    question = texts["question"]
    if IMAGE_PLACEHOLDER not in question:
        question = f"{IMAGE_PLACEHOLDER}\n" * len(row["images"]) + question
    question = pictures_first(question)
    _check_placeholders([question], len(row["images"]))
    return PreferencePair(
        pair_id=text_field(row, "id") or default_id,
        images=(),
        image_sha256=(),
        question=question,
        chosen=texts["chosen"],
        rejected=texts["rejected"],
        answer=text_field(row, "answer_gt"),
    )


def _messages(turns: list[dict[str, str]]) -> tuple[Message, ...]:
    messages = []
    for turn in turns:
        role = ROLES[turn["from"]]
        messages.append(Message(role, pictures_first(turn["value"]) if role == "user" else turn["value"]))
    if all(message.role != "user" for message in messages):
        raise RowError("the conversation has no question (`from`: `human`)")
    return tuple(messages)


def first_exchange(sample: Sample) -> Sample:
    """The conversation up to the end of the first answer to a question; what comes later is left out, with its
    pictures."""
    roles = [message.role for message in sample.messages]
    asked = roles.index("user")  # ShareGPT's conversations may open with the assistant
    if "assistant" not in roles[asked:]:
        return sample
    return replace(sample, messages=sample.messages[: roles.index("assistant", asked) + 1])


def pictures_first(text: str) -> str:
    """Move placeholders from the end of a user turn to its start; those within the text stay.

    LLaVA's files have them at either end and its trainer moves them too (haotian-liu/LLaVA, preprocess_multimodal);
    the endpoint also puts pictures first, so training and serving see one order.
    """
    end, count = _text_end(text, len(text)), 0
    while text.endswith(IMAGE_PLACEHOLDER, 0, end):
        end, count = _text_end(text, end - len(IMAGE_PLACEHOLDER)), count + 1
    if not end or not count or text.find(IMAGE_PLACEHOLDER, 0, end) >= 0:
        return text
    return f"{IMAGE_PLACEHOLDER}\n" * count + text[:end]


def _text_end(text: str, end: int) -> int:
    """Where text[:end] ends without the white space behind it."""
    while end and text[end - 1].isspace():
        end -= 1
    return end


def _language(row: Mapping[str, Any], messages: tuple[Message, ...]) -> str:
    """The row's own `language`; without one, `zh` where a Chinese character occurs."""
    named = text_field(row, "language")
    return named or ("zh" if any(CHINESE.search(message.content) for message in messages) else "en")


def text_field(row: Mapping[str, Any], key: str) -> str | None:
    """A field that is text or a number, as text; None where there is none.

    Raises:
        RowError: it is something else.
    """
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f"`{key}` must be text")
    return str(value)


def _check_placeholders(texts: Sequence[str], num_images: int) -> None:
    """Those of videos became `<image>` before; within a text `<video>` is HTML."""
    found = sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
    if found != num_images:
        raise RowError(f"{found} {IMAGE_PLACEHOLDER} placeholder(s) for {num_images} image(s)")
    if any(VIDEO_PLACEHOLDER in (text.strip()[: len(VIDEO_PLACEHOLDER)], text.strip()[-len(VIDEO_PLACEHOLDER) :])
           for text in texts):  # fmt: skip
        raise RowError(f"a question about a {VIDEO_PLACEHOLDER}, but no `video` or `videos` in the row")
