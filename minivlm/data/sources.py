"""Annotation files as users have them -> rows -> samples and pairs. Pictures are still names here.

LLaVA JSON: [{"id", "image": name | [names] | missing, "conversations": [{"from", "value"}], ...}], optionally with
"task", "language", "answer" and "split". MMPR JSON lines: {"image", "question", "chosen", "rejected", "answer_gt"}.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minivlm.data.errors import DataError
from minivlm.schema import IMAGE_PLACEHOLDER, Message, PreferencePair, Sample

SPLITS = ("train", "val", "test")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

TRAILING_PLACEHOLDERS = re.compile(rf"(?<=\S)(\s*{IMAGE_PLACEHOLDER})+\s*$")
CHINESE = re.compile("[\u4e00-\u9fff]")


class RowError(ValueError):
    """One row cannot be used; the text is the reason."""


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a file with their numbers, counted from 1: list items of `.json`, lines of `.jsonl` (as bytes).

    A line is decoded later, by `parse_row`, so that one bad line costs one row.

    Raises:
        DataError: no such file, another ending, or JSON that is broken as a whole (with its line).
    """
    if not path.is_file():
        raise DataError(f"No data file {path}. Correct `path` of that source in the config's `data` section")
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    elif path.suffix == ".json":
        yield from enumerate(_read_list(path), start=1)
    else:
        raise DataError(f"{path}: the ending says what is inside: .json (a LLaVA list) or .jsonl (one row per line)")


def parse_row(raw: Any) -> dict[str, Any]:
    """The row as a dict.

    Raises:
        RowError: the line is not JSON, or the row is not an object.
    """
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw)
        except json.JSONDecodeError as error:
            raise RowError(f"not JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, deep nesting
            raise RowError(f"not JSON: {type(error).__name__}") from None
    if not isinstance(raw, dict):
        raise RowError(f"a row must be an object with keys, not {type(raw).__name__}")
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowError("half of a surrogate pair, which is no character") from None
    return raw


def to_sample(row: Mapping[str, Any], *, stage: str, split: str, task: str, default_id: str) -> Sample:
    """A LLaVA row as a sample whose `images` are still the row's names; image_sha256 is empty.

    Args:
        split: of rows that name none; `auto` stays as it is until the picture's digest is known.
        task: of rows that name none.

    Raises:
        RowError: no conversation, an empty answer, placeholders unlike the images, or a field of the wrong kind.
    """
    images = _image_names(row)
    messages = _messages(row)
    answer = _text(row, "answer")
    if stage == "prompts":
        if not answer:
            raise RowError("a prompt needs the true `answer`")
    elif not any(message.role == "assistant" for message in messages):
        raise RowError("the conversation has no answer (`from`: `gpt`)")
    for message in messages:
        if message.role == "assistant" and not message.content.strip():
            raise RowError("an empty answer")
    _check_placeholders("".join(m.content for m in messages if m.role != "assistant"), images)
    chosen_split = row.get("split", split)
    if chosen_split not in (*SPLITS, "auto"):
        raise RowError(f"`split` is {str(chosen_split)[:40]!r}, not one of {', '.join(SPLITS)}")
    return Sample(
        sample_id=_text(row, "id") or default_id,
        images=images,
        image_sha256=(),
        messages=messages,
        stage=stage,
        split=chosen_split,
        task=_text(row, "task") or task,
        language=_language(row, messages),
        answer=answer,
    )


def to_pair(row: Mapping[str, Any], *, default_id: str) -> PreferencePair:
    """An MMPR row as a pair whose `images` are still names. A question without placeholders gets them in front.

    Raises:
        RowError: question, chosen or rejected is missing or empty, equal answers, or placeholders unlike images.
    """
    images = _image_names(row)
    texts = {}
    for key in ("question", "chosen", "rejected"):
        texts[key] = _text(row, key) or ""
        if not texts[key].strip():
            raise RowError(f"`{key}` is empty" if key == "question" else f"an empty answer (`{key}`)")
    if texts["chosen"].strip() == texts["rejected"].strip():
        raise RowError("chosen and rejected are the same")
    question = texts["question"]
    if IMAGE_PLACEHOLDER not in question:
        question = f"{IMAGE_PLACEHOLDER}\n" * len(images) + question
    question = pictures_first(question)
    _check_placeholders(question, images)
    return PreferencePair(
        pair_id=_text(row, "id") or default_id,
        images=images,
        image_sha256=(),
        question=question,
        chosen=texts["chosen"],
        rejected=texts["rejected"],
        answer=_text(row, "answer_gt"),
    )


def _read_list(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}). Correct the file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}). Save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}. A LLaVA file is a flat list of rows of text") from None
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a {type(rows).__name__}. A LLaVA file is a list of rows: [{{...}}, ...]")
    return rows


def _image_names(row: Mapping[str, Any]) -> tuple[str, ...]:
    value = row.get("image") or []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RowError("`image` must be a file name or a list of them")
    return tuple(names)


def _messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RowError("no `conversations`")
    messages = []
    for turn in turns:
        role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise RowError("a turn needs `from` (human, gpt or system) and a text `value`")
        messages.append(Message(role, pictures_first(turn["value"]) if role == "user" else turn["value"]))
    if all(message.role != "user" for message in messages):
        raise RowError("the conversation has no question (`from`: `human`)")
    return tuple(messages)


def pictures_first(text: str) -> str:
    """Move placeholders from the end of a user turn to its start; those within the text stay.

    LLaVA's files have them at either end and its trainer moves them too (haotian-liu/LLaVA, preprocess_multimodal);
    the endpoint also puts pictures first, so training and serving see one order.
    """
    match = TRAILING_PLACEHOLDERS.search(text)
    if match is None or IMAGE_PLACEHOLDER in text[: match.start()]:
        return text
    return f"{IMAGE_PLACEHOLDER}\n" * match.group().count(IMAGE_PLACEHOLDER) + text[: match.start()]


def _language(row: Mapping[str, Any], messages: tuple[Message, ...]) -> str:
    """The row's own `language`; without one, `zh` where a Chinese character occurs."""
    named = _text(row, "language")
    return named or ("zh" if any(CHINESE.search(message.content) for message in messages) else "en")


def _text(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f"`{key}` must be text")
    return str(value)


def _check_placeholders(text: str, images: tuple[str, ...]) -> None:
    found = text.count(IMAGE_PLACEHOLDER)
    if found != len(images):
        raise RowError(f"{found} {IMAGE_PLACEHOLDER} placeholder(s) for {len(images)} image(s)")
