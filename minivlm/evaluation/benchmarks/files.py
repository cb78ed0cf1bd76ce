"""Files of benchmarks -> numbered raw rows: JSON (a list, an object that holds one, or an object per line), JSON lines,
parquet, tables, MME's folders. What is wrong with one row is found later; a broken file is one clear error.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minivlm.data.errors import DataError, RowError
from minivlm.data.readers import read_rows
from minivlm.data.sources import decode_row

MAX_JSON_BYTES = 2**30
MAX_CELL_CHARS = 2**26
"""Of a table: pictures lie in cells as base64."""

Numbered = Iterator[tuple[int, Any]]


def raw_rows(path: Path, key: str) -> Numbered:
    """(number, row) of a file or a folder of parquet files; a row that cannot be read is its RowError.

    Args:
        key: of the list in a JSON object. An object without it whose values are objects is id -> row; the id becomes
            the row's `id` where it has none.

    Raises:
        DataError: no such file, or it is broken as a whole.
    """
    if path.is_dir():
        shards = sorted(path.glob("*.parquet"))
        if not shards:
            raise DataError(f"{path} is a folder without .parquet files. Name the benchmark's file in `path`")
        first = 0
        for shard in shards:
            number = 0
            for number, row in _decoded(read_rows(shard)):
                yield first + number, row
            first += number
        return
    if not path.is_file():
        raise DataError(f"No benchmark file {path}. Correct `path` under evaluation.benchmarks")
    try:
        if path.suffix in (".parquet", ".jsonl"):
            yield from _decoded(read_rows(path))
        elif path.suffix == ".tsv":
            yield from _table(path)
        elif path.suffix == ".json":
            yield from _json_rows(path, key)
        else:
            raise DataError(f"{path}: a benchmark file ends in .json, .jsonl, .parquet or .tsv")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Correct it under evaluation.benchmarks") from None


def load_json(path: Path) -> Any:
    """A whole JSON file.

    Raises:
        DataError: it is not there, too large, or not JSON.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DataError(f"{path} has more than {MAX_JSON_BYTES} bytes: split it")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Correct it under evaluation.benchmarks") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}). Correct the file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({type(error).__name__}). Correct the file") from None


def rows_of(tree: Any, key: str, path: Path) -> Numbered:
    """Rows of a JSON tree: a list, the list under `key`, or the values of an object.

    Raises:
        DataError: none of these.
    """
    if isinstance(tree, Mapping):
        if isinstance(tree.get(key), list):
            tree = tree[key]
        elif tree and all(isinstance(value, Mapping) for value in tree.values()):
            tree = [{"id": name, **value} for name, value in tree.items()]
    if not isinstance(tree, list):
        raise DataError(f"{path} holds neither a list nor a list under `{key}`: is it this benchmark's file?")
    for number, row in enumerate(tree, 1):
        yield number, row if isinstance(row, dict) else RowError(f"a row must be an object, not {type(row).__name__}")


def _decoded(rows: Numbered) -> Numbered:
    for number, raw in rows:
        try:
            yield number, decode_row(raw)
        except RowError as error:
            yield number, error


def _json_rows(path: Path, key: str) -> Numbered:
    with path.open("rb") as file:
        start = file.readline(MAX_CELL_CHARS).strip()
    if start.startswith(b"{") and start.endswith(b"}") and _is_object(start):  # POPE's files are lines, named .json
        with path.open("rb") as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            yield from _decoded(lines)
        return
    yield from rows_of(load_json(path), key, path)


def _is_object(line: bytes) -> bool:
    """A line that is a row of its own; one object that fills the file holds others."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and not any(isinstance(value, dict | list) for value in row.values())


def _table(path: Path) -> Numbered:
    """Rows of a table with a header; an empty cell is left out."""
    csv.field_size_limit(MAX_CELL_CHARS)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(_without_nul(file), delimiter="\t"), 1):
                if None in row or None in row.values():
                    yield number, RowError("not as many cells as the header has")
                else:
                    yield number, {name: cell for name, cell in row.items() if cell != ""}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not a table of tab-separated UTF-8 text ({reason}). Correct the file") from None


def _without_nul(file: io.TextIOBase) -> Iterator[str]:
    for line in file:
        yield line.replace("\0", "")


def vqav2_rows(path: Path, annotations: Path) -> Numbered:
    """Questions joined with their annotations by `question_id`; `image` is COCO_SUBTYPE_NUMBER.jpg.

    A question with no annotation, or with several, is a RowError; an annotation without an id belongs to no question.

    Raises:
        DataError: a file is not what VQAv2 publishes.
    """
    asked, answered = load_json(path), load_json(annotations)
    subtype = asked.get("data_subtype") if isinstance(asked, dict) else None
    if not isinstance(subtype, str):
        raise DataError(f"{path} has no `data_subtype`: is it VQAv2's file of questions?")
    by_id: dict[Any, Any] = {}
    repeated: set[Any] = set()
    for _, row in rows_of(answered, "annotations", annotations):
        name = row.get("question_id") if isinstance(row, dict) else None
        if isinstance(name, int | str):
            if name in by_id:
                repeated.add(name)
            by_id[name] = row.get("answers")
    for number, row in rows_of(asked, "questions", path):
        if isinstance(row, dict):
            name, picture = row.get("question_id"), row.get("image_id")
            if not isinstance(name, int | str) or name not in by_id:
                row = RowError(f"question {str(name)[:40]!r} has no annotation in {annotations.name}")
            elif name in repeated:
                row = RowError(f"several annotations in {annotations.name} for question {str(name)[:40]!r}")
            elif isinstance(picture, int):
                row = row | {"answers": by_id[name], "image": f"COCO_{subtype}_{picture:012}.jpg"}
        yield number, row


def mme_rows(folder: Path) -> Numbered:
    """MME's release: CATEGORY/NAME.txt of two lines "question<tab>answer" beside NAME.jpg or .png, or with the texts in
    questions_answers_YN and the pictures in images. Rows are numbered over all files in order of their names.

    Raises:
        DataError: no such text.
    """
    texts = sorted(path for path in folder.rglob("*.txt") if path.parent != folder)
    if not texts:
        raise DataError(f"{folder} has no CATEGORY/*.txt of MME. Correct `path` under evaluation.benchmarks")
    number = 0
    for text in texts:
        relative = text.relative_to(folder)
        category = relative.parts[0]
        pictures = text.parent.parent / "images" if text.parent.name == "questions_answers_YN" else text.parent
        named = [pictures / f"{text.stem}{ending}" for ending in (".jpg", ".png", ".jpeg")]
        found = [picture for picture in named if picture.is_file()]
        try:
            lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError):
            lines = [""]
        for line in lines:
            number += 1
            question, tab, answer = line.rpartition("\t")
            if not tab:
                yield number, RowError(f"{relative}: not UTF-8 lines of a question, a tab and an answer")
            elif not found:
                yield number, RowError(f"{relative}: no picture {text.stem}.jpg or .png in {pictures.name}")
            else:
                name = f"{category}/{found[0].name}"
                place = found[0].relative_to(folder).as_posix()
                yield number, {
                    "question_id": name, "category": category, "question": question, "answer": answer, "image": place,
                }  # fmt: skip
