"""Rows in the formats that users have -> one shape. A row's format is seen from its keys.

    sample:      {"id", "images": [name | bytes], "conversations": [{"from", "value"}], "task", "language", "answer"}
    preference:  {"id", "images": [name | bytes], "question", "chosen", "rejected", "answer_gt"}
    both:        "videos": [name | bytes], where there are any, under `video` or `videos`

| format | its mark | source |
|---|---|---|
| LLaVA, LLaMA-Factory | `conversations` | haotian-liu/LLaVA docs/Finetune_Custom_Data.md |
| MiniMind-V | `conversations` as JSON text, `image_bytes` | jingyaogong/minimind-v dataset/lm_dataset.py |
| ms-swift, OpenAI | `messages` | modelscope/ms-swift docs, custom dataset |
| FineVision, the Cauldron | `texts` of {user, assistant} | huggingface/nanoVLM data/datasets.py |
| WebDataset | `__key__`, members named by their endings | webdataset/webdataset README |
| MMPR | `question`, `chosen`, `rejected` | OpenGVLab/MMPR |
| its prompts | `question`, `answer`; or `chosen` and a null `rejected` | as above |
| TRL | `prompt`, `chosen`, `rejected` | huggingface/trl docs/source/dataset_formats.md |
| ms-swift | `messages`, `rejected_response` | as above |
| LLaMA-Factory | `conversations`, `chosen`, `rejected` | hiyouga/LLaMA-Factory data/README.md |

Pure: nothing is opened here.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from typing import Any

from minivlm.data.errors import RowError
from minivlm.schema import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER

Row = dict[str, Any]

SHARED_KEYS = ("id", "task", "language", "answer", "answer_gt", "split")
"""Mean the same in every format."""

CAPTION_PROMPT = "Describe the image."
VIDEO_CAPTION_PROMPT = "Describe the video."
"""Questions of rows that have a caption and nothing else (WebDataset's `txt`)."""

WEBDATASET_PICTURE = re.compile(r"(?:(\d{1,6})\.)?(?:jpg|jpeg|png|webp|gif|bmp)", re.IGNORECASE)
WEBDATASET_VIDEO = re.compile(r"(?:(\d{1,6})\.)?(?:mp4|mov|webm|mkv|avi)", re.IGNORECASE)

PART_PLACES = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}

MARKS = (
    ("__key__", "WebDataset"),
    ("rejected_response", "ms-swift preference"),
    ("image_bytes", "MiniMind-V"),
    ("conversations", "LLaVA"),
    ("messages", "ms-swift"),
    ("texts", "FineVision"),
    ("prompt", "TRL preference"),
    ("question", "MMPR"),
)
"""The first key that a row has says its format."""

SPEAKERS = {  # of all formats -> LLaVA's
    "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "model": "gpt", "system": "system",
}  # fmt: skip


def format_name(row: Mapping[str, Any]) -> str:
    """Whose format a row is in, for people to read.

    Raises:
        RowError: no known one.
    """
    for key, name in MARKS:
        if row.get(key) is not None:
            return name
    keys = ", ".join(sorted(map(str, row))[:8])
    raise RowError(f"no known format: keys {keys}. A row needs `conversations`, `messages`, `texts` or `question`")


def normalize(row: Mapping[str, Any]) -> Row:
    """The row in the shape above.

    Raises:
        RowError: no known format, or a field of the wrong kind.
    """
    row = {key: value for key, value in row.items() if value is not None}
    name = format_name(row)
    if "rejected" in row and name != "WebDataset":
        name = "preference"
    shared = {key: row[key] for key in SHARED_KEYS if key in row}
    found = shared | CONVERTERS[name](row)
    videos = _only(row, ("videos", "video"), "videos")
    return found | {"videos": videos} if videos else found


def rated_columns(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where a row has its ratings: the row itself, in a WebDataset its .json member."""
    return _inner(row) if "__key__" in row else row


def pictures(value: Any) -> list[str | bytes]:
    """File names and encoded pictures from what a row holds: a name, bytes, a data URI, {bytes, path}, or a list.

    Raises:
        RowError: something else, an empty place in a list, or a broken data URI.
    """
    if value is None or value == "":
        return []
    return [_picture(item) for item in value] if isinstance(value, list | tuple) else [_picture(value)]


def _picture(value: Any) -> str | bytes:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.startswith("data:"):
        header, _, payload = value.partition(",")
        try:
            if not header.endswith(";base64"):
                raise ValueError
            return base64.b64decode(payload, validate=True)
        except (ValueError, binascii.Error):
            raise RowError("a data URI that is not base64") from None
    if isinstance(value, str | bytes) and value:
        return value
    raise RowError(f"a picture must be a file name, bytes or a data URI, not {type(value).__name__}")


def _pictures_of(row: Mapping[str, Any]) -> list[str | bytes]:
    return _only(row, ("images", "image", "image_bytes"), "pictures")


def _only(row: Mapping[str, Any], keys: tuple[str, ...], what: str) -> list[str | bytes]:
    found = {key: files for key in keys if (files := pictures(row.get(key)))}
    if len(found) > 1:
        raise RowError(f"{what} under several keys: {', '.join(found)}")
    return next(iter(found.values()), [])


def _conversation(row: Mapping[str, Any]) -> Row:
    """LLaVA, MiniMind-V, ms-swift, OpenAI."""
    turns, images = _turns(row.get("conversations", row.get("messages"))), _pictures_of(row)
    has_place = any(IMAGE_PLACEHOLDER in turn["value"] for turn in turns)
    if "image_bytes" in row and not has_place:
        images = []  # MiniMind-V puts a black 8 x 8 picture beside rows of text
    return {"conversations": turns, "images": images}


def _question(row: Mapping[str, Any]) -> Row:
    """Inputs of MMPR's pipelines: a question with the true `answer`, or with an answer to cut and continue."""
    if not isinstance(row["question"], str):
        raise RowError("`question` must be text")
    images, turns = _pictures_of(row), [{"from": "human", "value": row["question"]}]
    turns[0]["value"] = _with_places(turns[0]["value"], turns, images)
    if "chosen" in row:
        turns.append({"from": "gpt", "value": _answer(row["chosen"], "chosen")})
    return {"conversations": turns, "images": images}


def _texts(row: Mapping[str, Any]) -> Row:
    """FineVision: pictures come before the first question and have no placeholder."""
    images, turns = _pictures_of(row), []
    if not isinstance(row["texts"], list) or not row["texts"]:
        raise RowError("`texts` must be a list of {user, assistant}")
    for item in row["texts"]:
        if not isinstance(item, Mapping) or not all(isinstance(item.get(key), str) for key in ("user", "assistant")):
            raise RowError("an item of `texts` needs a text `user` and a text `assistant`")
        turns += [{"from": "human", "value": item["user"]}, {"from": "gpt", "value": item["assistant"]}]
    turns[0]["value"] = _with_places(turns[0]["value"], turns, images)
    return {"conversations": turns, "images": images}


def _webdataset(row: Mapping[str, Any]) -> Row:
    """Members of one key: files (`.jpg`, or `.0.jpg .1.jpg`), `json` (another format's row, or {caption}) or `txt`."""
    images, videos = _members(row, WEBDATASET_PICTURE), _members(row, WEBDATASET_VIDEO)
    named: Row = {"id": row["__key__"], "images": images} | ({"videos": videos} if videos else {})
    inner = _inner(row)
    if any(inner.get(key) is not None for key in ("conversations", "messages", "texts", "rejected")):
        return normalize({key: value for key, value in inner.items() if key != "__key__"} | named)
    caption = inner.get("caption")
    if caption is None and "txt" in row:
        caption = _member(row, "txt")
    if not isinstance(caption, str):
        raise RowError("no caption: a sample needs a .txt or .json member")
    if not images and not videos:
        raise RowError("a caption without a picture: members of one key must stand together")
    named |= {key: inner[key] for key in SHARED_KEYS if key in inner and key != "id"}
    question = f"{IMAGE_PLACEHOLDER}\n" * len(images) + f"{VIDEO_PLACEHOLDER}\n" * len(videos)
    question += VIDEO_CAPTION_PROMPT if videos else CAPTION_PROMPT
    return named | {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]}


def _members(row: Mapping[str, Any], names: re.Pattern[str]) -> list[Any]:
    found = {name: place for name in row if (place := names.fullmatch(name))}
    return [row[name] for name in sorted(found, key=lambda name: int(found[name][1] or -1))]


def _inner(row: Mapping[str, Any]) -> Row:
    """The object in the .json member, empty without one."""
    if row.get("json") is None:
        return {}
    text = _member(row, "json")
    try:
        inner = json.loads(text)
    except (ValueError, RecursionError):
        raise RowError("its .json member is not JSON") from None
    if not isinstance(inner, dict):
        raise RowError("its .json member is not an object")
    return inner


def _member(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    try:
        text = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        raise RowError(f"its .{name} member is not UTF-8") from None
    if not isinstance(text, str):
        raise RowError(f"its .{name} member must be text")
    return text


def _preference(row: Mapping[str, Any]) -> Row:
    """MMPR, TRL, ms-swift, LLaMA-Factory: one question, a better and a worse answer."""
    if "rejected_response" in row:
        *asked, chosen = _turns(row.get("messages"))
        answers = {"chosen": chosen["value"], "rejected": _answer(row["rejected_response"], "rejected_response")}
        if chosen["from"] != "gpt":
            raise RowError("the last of `messages` must be the assistant's answer")
        question = _only_question(asked)
    else:
        answers = {key: _answer(row.get(key), key) for key in ("chosen", "rejected")}
        given = row.get("question", row.get("prompt"))
        if not isinstance(given, str):
            given = _only_question(_turns(given or row.get("conversations", row.get("messages"))))
        question = given
    return {"question": question, "images": _pictures_of(row)} | answers


def _only_question(turns: list[Row]) -> str:
    if len(turns) != 1 or turns[0]["from"] != "human":
        raise RowError("a preference row needs exactly one question before its answers")
    question: str = turns[0]["value"]
    return question


def _answer(value: Any, name: str) -> str:
    """Text, one turn, or a list with one turn."""
    if isinstance(value, str):
        return value
    turns = _turns(value if isinstance(value, list) else [value])
    if len(turns) != 1 or turns[0]["from"] != "gpt":
        raise RowError(f"`{name}` must be text or one turn of the assistant")
    text: str = turns[0]["value"]
    return text


def _turns(value: Any) -> list[Row]:
    """`from`/`value` or `role`/`content` turns, as objects or as JSON text; content parts are joined in their order."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError("`conversations` is text but not JSON") from None
    if not isinstance(value, list) or not value:
        raise RowError("no `conversations`")
    turns = []
    for turn in value:
        speaker = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else None
        if isinstance(text, list):
            text = "".join(_part(part) for part in text)
        if SPEAKERS.get(str(speaker)) is None or not isinstance(text, str):
            raise RowError("a turn needs `from` (human, gpt or system) and a text `value`, or `role` and `content`")
        turns.append({"from": SPEAKERS[str(speaker)], "value": text})
    return turns


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in PART_PLACES:
        return f"{PART_PLACES[kind]}\n"
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RowError("a part of `content` must be {type: text, text}, {type: image} or {type: video}")


def _with_places(question: str, turns: list[Row], images: list[str | bytes]) -> str:
    if any(IMAGE_PLACEHOLDER in turn["value"] for turn in turns):
        return question
    return f"{IMAGE_PLACEHOLDER}\n" * len(images) + question


CONVERTERS = {
    "WebDataset": _webdataset,
    "ms-swift preference": _preference,
    "MiniMind-V": _conversation,
    "LLaVA": _conversation,
    "ms-swift": _conversation,
    "FineVision": _texts,
    "TRL preference": _preference,
    "MMPR": _question,
    "preference": _preference,
}
