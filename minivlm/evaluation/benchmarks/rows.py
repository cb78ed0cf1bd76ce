"""One raw row of a benchmark -> what is asked and what is true. A function per kind; what does not fit is a RowError.

The text is the file's own question, then the options of a multiple choice, then the kind's instruction (`SHORT`,
`LETTER`, `CAPTION`), as lmms-eval asks it; nothing else is changed. Pictures are not opened here.
"""

import ast
import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minivlm.data.errors import RowError
from minivlm.data.formats import pictures
from minivlm.data.sources import text_field
from minivlm.schema import IMAGE_PLACEHOLDER
from minivlm.scoring.extraction import LETTERS

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."

NUMBER = "row number"
"""Key under which the reader says which row of the file it is."""

MAX_CHARS = 20_000
MAX_TRUTHS = 100

Raw = Mapping[str, Any]
Picture = str | bytes


@dataclass(frozen=True)
class Row:
    """One question. `pictures` are names below the image folder, or encoded pictures; `group` as in `Question`."""

    question_id: str
    text: str
    pictures: tuple[Picture, ...]
    truths: tuple[str, ...]
    scorer: str
    choices: tuple[str, ...] = ()
    group: str = ""


def check_row(row: Row) -> Row:
    """The row, if its texts are of a size to ask.

    Raises:
        RowError: naming what is wrong.
    """
    if IMAGE_PLACEHOLDER in row.text:
        raise RowError(f"the question holds {IMAGE_PLACEHOLDER}, which marks a picture's place")
    longest = max(map(len, (row.text, row.question_id, row.group, *row.truths, *row.choices)))
    if longest > MAX_CHARS or len(row.truths) > MAX_TRUTHS:
        raise RowError(f"a text of {longest} characters, {len(row.truths)} answers: {MAX_CHARS}, {MAX_TRUTHS} at most")
    try:
        "".join((row.question_id, row.text, row.group, *row.truths, *row.choices)).encode()
    except UnicodeEncodeError:
        raise RowError("half of a surrogate pair, which is no character") from None
    return row


def vqav2(row: Raw) -> Row:
    """`answers` and `image` come from the reader, which joins the two files."""
    answers = [_text(answer, "answer") for answer in _objects(row, "answers")]
    return _short(row, _text(row, "question_id"), answers, "vqa", (_text(row, "image"),))


def textvqa(row: Raw) -> Row:
    """TextVQA_0.5.1_val.json: `data`, pictures IMAGE_ID.jpg."""
    names = _given(row, "image") or (f"{_text(row, 'image_id')}.jpg",)
    return _short(row, _text(row, "question_id"), _texts(row, "answers"), "vqa", names)


def scienceqa(row: Raw) -> Row:
    """problems.json: id -> problem, pictures SPLIT/ID/image.png; `answer` counts from 0. Rows without a picture too."""
    question_id, choices = _name(row, "id", "pid"), _texts(row, "choices")
    given = row.get("image")
    names = (f"{_text(row, 'split')}/{question_id}/{given}",) if isinstance(given, str) else _given(row, "image")
    hint = text_field(row, "hint")
    text = f"Context: {hint}\n{_question(row, 'question')}" if hint else _question(row, "question")
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < min(len(choices), len(LETTERS)):
        raise RowError(f"`answer` is {str(answer)[:40]!r}, not the number of one of {len(choices)} choices")
    return _choice(question_id, text, choices, LETTERS[answer], names, text_field(row, "subject") or "")


def chartqa(row: Raw) -> Row:
    """test_human.json, test_augmented.json: a list of {imgname, query, label}; parquet has no imgname, and one question
    is asked of several charts there, so the row's number tells them apart."""
    names = _given(row, "image") or (_text(row, "imgname"),)
    truths = _texts(row, "label", "answer")
    name = row.get("id") or f"{_name(row, 'imgname')}: {_text(row, 'query', 'question')}"
    return _short(row, str(name), truths, "relaxed", names, group=text_field(row, "type") or "")


def docvqa(row: Raw) -> Row:
    """val_v1.0.json: `data` with `image`, documents/NAME.png; InfoVQA's `image_local_name`."""
    names = (_text(row, "image_local_name"),) if "image_local_name" in row else _given(row, "image")
    return _short(row, _text(row, "questionId"), _texts(row, "answers"), "anls", names)


def ocrbench(row: Raw) -> Row:
    """OCRBench.json: a list of {dataset_name, type, question, answers, image_path, id}; parquet has other names."""
    names = _given(row, "image") or (_text(row, "image_path"),)
    kind = _text(row, "type", "question_type")
    scorer = "contains_formula" if _text(row, "dataset_name", "dataset") == "HME100k" else "contains"
    return Row(
        _name(row, "id"), _question(row, "question"), names, tuple(_texts(row, "answers", "answer")), scorer, (), kind
    )


def pope(row: Raw) -> Row:
    """coco_pope_random.json: lines of {question_id, image, text, label}; in parquet question, answer, category."""
    group = text_field(row, "category") or ""
    name = text_field(row, "id") or f"{group}/{_text(row, 'question_id')}".removeprefix("/")
    truth = _text(row, "label", "answer").strip().lower()
    text = f"{_question(row, 'text', 'question')}\n{SHORT}"
    return Row(name, text, _given(row, "image"), (truth,), "pope", (), group)


def mme(row: Raw) -> Row:
    """`question_id` is CATEGORY/PICTURE, shared by two questions, which carry "Please answer yes or no." themselves."""
    picture, category = _text(row, "question_id"), _text(row, "category")
    group = picture if picture.startswith(f"{category}/") else f"{category}/{picture}"
    text = _question(row, "question")
    truth = _text(row, "answer").strip().lower().replace(".", "")
    return Row(f"{group}: {text}", text, _given(row, "image"), (truth,), "mme", (), group)


def multiple_choice(row: Raw) -> Row:
    """MMStar (options in the question), MMMU (`options` as a list's text, image_1 to image_7), tables with A, B, C, D.

    MMMU's open questions are short answers.
    """
    name, question = _text(row, "id", "index", "question_id"), _question(row, "question")
    group = text_field(row, "l2_category") or text_field(row, "l2-category") or text_field(row, "category") or ""
    if name.count("_") >= 2 and not group:
        group = name.partition("_")[2].rpartition("_")[0]
    numbered = [picture for number in range(1, 8) for picture in _given(row, f"image_{number}")]
    names = tuple(numbered) or _given(row, "image")
    if row.get("question_type") == "open":
        truths = _listed(row["answer"]) if str(row.get("answer", "")).startswith("[") else [_text(row, "answer")]
        return Row(name, f"{question}\n{SHORT}", names, tuple(truths), "short_answer", (), group)
    hint = text_field(row, "hint")
    question = f"{hint}\n{question}" if hint else question
    choices = [_text(row, letter) for letter in _columns(row)] or _listed(row.get("options", []))
    if choices:
        return _choice(name, question, choices, _text(row, "answer").strip(), names, group)
    inside = _options_inside(question)
    return Row(name, f"{question}\n{LETTER}", names, (_text(row, "answer").strip(),), "choice", inside, group)


def mathvista(row: Raw) -> Row:
    """testmini: {pid, question, image, choices, answer, unit, metadata}; `answer` is the text of a choice."""
    choices = _texts(row, "choices") if row.get("choices") is not None else []
    metadata = row.get("metadata")
    group = text_field(metadata, "task") if isinstance(metadata, Mapping) else None
    text, unit = _question(row, "question"), text_field(row, "unit")
    text = f"{text} (Unit: {unit})" if unit else text
    names, truth = _given(row, "decoded_image") or _given(row, "image"), _text(row, "answer")
    end = _options(choices) + LETTER if choices else SHORT
    return Row(_name(row, "pid", "id"), f"{text}\n{end}", names, (truth,), "math", tuple(choices), group or "")


def coco_captions(row: Raw) -> Row:
    """dataset_coco.json of Karpathy: `images` of {filepath, filename, sentences: [{raw}], split, cocoid}."""
    folder = text_field(row, "filepath")
    name = f"{folder}/{_text(row, 'filename')}" if folder else _text(row, "filename")
    truths = [_text(sentence, "raw").strip() for sentence in _objects(row, "sentences")]
    return Row(_text(row, "cocoid", "imgid"), CAPTION, (name,), tuple(truths), "captions")


READ: dict[str, Callable[[Raw], Row]] = {
    "vqav2": vqav2, "textvqa": textvqa, "scienceqa": scienceqa, "chartqa": chartqa, "docvqa": docvqa,
    "infovqa": docvqa, "ocrbench": ocrbench, "pope": pope, "mme": mme, "multiple_choice": multiple_choice,
    "mathvista": mathvista, "coco_captions": coco_captions,
}  # fmt: skip


def _short(
    row: Raw, name: str, truths: Sequence[str], scorer: str, names: tuple[Picture, ...], *, group: str = ""
) -> Row:
    text = f"{_question(row, 'question', 'query')}\n{SHORT}"
    return Row(name, text, names, tuple(truths), scorer, (), group)


def _choice(
    name: str, question: str, choices: Sequence[str], letter: str, names: tuple[Picture, ...], group: str
) -> Row:
    return Row(name, f"{question}\n{_options(choices)}{LETTER}", names, (letter,), "choice", tuple(choices), group)


def _options(choices: Sequence[str]) -> str:
    return "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=False))


def _text(row: Any, *keys: str) -> str:
    """The first of these fields that the row has, as text.

    Raises:
        RowError: none, or it is something else.
    """
    for key in keys:
        found = text_field(row, key) if isinstance(row, Mapping) else None
        if found is not None:
            return found
    raise RowError(f"no `{'` or `'.join(keys)}`")


def _question(row: Raw, *keys: str) -> str:
    """The question without blanks around it.

    Raises:
        RowError: none, or an empty one.
    """
    text = _text(row, *keys).strip()
    if not text:
        raise RowError("an empty question")
    return text


def _name(row: Raw, *keys: str) -> str:
    """The row's id, else its number in the file."""
    return next((found for key in keys if (found := text_field(row, key))), f"row {row[NUMBER]}")


def _texts(row: Raw, *keys: str) -> list[str]:
    """A list of texts, or one text as a list."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, list | tuple):
            return [_text({key: item}, key) for item in value]
        if value is not None:
            return [_text(row, key)]
    raise RowError(f"no `{'` or `'.join(keys)}`")


def _objects(row: Raw, key: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list | tuple):
        raise RowError(f"no list `{key}`")
    return list(value)


def _given(row: Raw, key: str) -> tuple[Picture, ...]:
    """Pictures of a field: names, bytes, {bytes, path}; a long text that is no name is base64, as in tables."""
    value = row.get(key)
    if isinstance(value, str) and len(value) > 512 and not value.startswith("data:"):
        try:
            value = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise RowError(f"`{key}` is neither a file name nor base64") from None
    return tuple(pictures(value))


def _columns(row: Raw) -> list[str]:
    """A, B, C, .. as far as the row has them."""
    return [letter for place, letter in enumerate(LETTERS) if all(key in row for key in LETTERS[: place + 1])]


def _listed(value: Any) -> list[str]:
    """A list, or the text of one."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if len(value) <= MAX_CHARS else None
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
    if not isinstance(value, list | tuple) or not all(isinstance(item, str | int | float) for item in value):
        raise RowError("`options` or `answer` is not a list of texts")
    return [str(item) for item in value]


def _options_inside(question: str) -> tuple[str, ...]:
    """Options that stand in the question ("A: cat, B: dog", "(A) cat (B) dog"); four empty ones if none is found."""
    for form in ("{}: ", "({}) ", "{}. "):
        places: list[int] = []
        for letter in LETTERS:
            mark = form.format(letter)
            place = question.find(mark, places[-1] + len(mark) if places else 0)
            if place < 0:
                break
            places.append(place)
        if len(places) >= 2:
            size, ends = len(form.format("A")), [*places[1:], len(question)]
            spans = zip(places, ends, strict=True)
            return tuple(question[start + size : end].strip(" ,\n;") for start, end in spans)
    return ("",) * 4
