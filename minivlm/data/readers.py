"""Annotation files -> parts that tasks read on their own -> numbered raw rows, one after another.

| ending | a row is | a part is |
|---|---|---|
| .json | an item of the list, as bytes | the file |
| .jsonl | a line, as bytes | some megabytes of lines |
| .parquet | a table row | a row group |
| .tar (WebDataset) | the members of one key | the file |

A part holds one row in memory at a time (a parquet part, a few dozen). What is wrong with one row is found later.
"""

import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from minivlm.data.errors import DataError, RowError

ENDINGS = (".json", ".jsonl", ".parquet", ".tar")
LINES_BYTES = 8 * 2**20
"""Size of a part of a .jsonl file."""

TEXT_CHARS = 2**20
UNREADABLE = (
    OSError, ValueError, TypeError, OverflowError, EOFError, pa.ArrowException, tarfile.TarError, zlib.error,
    lzma.LZMAError,
)  # fmt: skip
"""What readers of damaged archives and tables raise."""

CUT_CHARS = 16
"""An error so near to the end of what was read may come from a row that goes on."""

MAX_ROW_CHARS = 2**26
SEPARATORS = tuple(" \t\r\n,]")
PARQUET_ROWS = 32
MAX_MEMBER_BYTES = 64 * 2**20
"""A larger member of a tar file costs its row."""


@dataclass(frozen=True)
class Part:
    """What one task reads of a file. `first_row` counts from 1; start and stop are bytes (.jsonl) or row groups."""

    path: str
    first_row: int = 1
    start: int = 0
    stop: int = 0


def list_parts(path: Path) -> list[Part]:
    """The parts of a file, from its size and footer alone (.jsonl: its line ends are counted).

    Raises:
        DataError: no such file, another ending, or a broken parquet footer.
    """
    if not path.is_file():
        raise DataError(f"No data file {path}. Correct `path` of that source in the config's `data` section")
    if path.suffix not in ENDINGS:
        raise DataError(f"{path}: the ending says what is inside; known are {', '.join(ENDINGS)}")
    if path.suffix == ".jsonl":
        return _line_parts(path)
    if path.suffix == ".parquet":
        return _group_parts(path)
    return [Part(str(path))]


def read_part(part: Part) -> Iterator[tuple[int, Any]]:
    """(number, raw row) of a part; a raw row that is a RowError says why it cannot be read.

    Raises:
        DataError: the file is broken as a whole; with its line where it is text.
    """
    path = Path(part.path)
    read: Callable[[Path, Part], Iterator[tuple[int, Any]]] = {
        ".json": _read_list,
        ".jsonl": _read_lines,
        ".parquet": _read_groups,
        ".tar": _read_tar,
    }[path.suffix]
    try:
        yield from read(path, part)
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}). Replace the file") from None


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """All rows of a file."""
    for part in list_parts(path):
        yield from read_part(part)


def _line_parts(path: Path) -> list[Part]:
    parts, line, start, position = [], 1, 0, 0
    with path.open("rb") as file:
        first = 1
        while chunk := file.read(LINES_BYTES):
            end = chunk.rfind(b"\n") + 1
            position += len(chunk)
            if not end:
                continue  # a line longer than a part
            line += chunk.count(b"\n")
            stop = position - len(chunk) + end
            parts.append(Part(str(path), first, start, stop))
            first, start = line, stop
    return [*parts, Part(str(path), first, start, position)] if position > start else parts


def _read_lines(path: Path, part: Part) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        file.seek(part.start)
        number = part.first_row
        while file.tell() < part.stop:
            line = file.readline(MAX_ROW_CHARS)
            if len(line) == MAX_ROW_CHARS:
                yield number, RowError(f"a line of more than {MAX_ROW_CHARS} bytes")
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_ROW_CHARS)
            elif line.strip():
                yield number, line
            number += 1


def _group_parts(path: Path) -> list[Part]:
    try:
        footer = pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a parquet file ({' '.join(str(error).split())[:120]}). Replace it") from None
    parts, first = [], 1
    for group in range(footer.num_row_groups):
        parts.append(Part(str(path), first, group, group + 1))
        first += footer.row_group(group).num_rows
    return parts


def _read_groups(path: Path, part: Part) -> Iterator[tuple[int, Any]]:
    number = part.first_row
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(PARQUET_ROWS, row_groups=list(range(part.start, part.stop))):
            for row in _rows(batch):
                yield number, row
                number += 1


def _rows(batch: pa.RecordBatch) -> Iterator[Any]:
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):  # a date beyond Python's, text that is not UTF-8
        for place in range(len(batch)):
            try:
                yield batch.slice(place, 1).to_pylist()[0]
            except (ValueError, OverflowError, pa.ArrowException) as error:
                yield RowError(f"a cell cannot be read: {' '.join(str(error).split())[:160]}")


def _read_tar(path: Path, part: Part) -> Iterator[tuple[int, Any]]:
    """Neighbouring members with one key are a row; a key is the name up to the first dot of its last part."""
    number, key = part.first_row, ""
    row: Any = None
    seen: set[str] = set()
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            if member.isdir() or name.startswith("._"):  # what macOS puts beside every file
                continue
            found = f"{folder}/{stem}" if folder else stem
            if found != key and row is not None:
                yield number, row
                number += 1
            if found != key:
                key, row = found, {"__key__": found}
                if found in seen:
                    row = RowError(f"key {found[:120]!r} stands in two places: members of one key must be neighbours")
                seen.add(found)
            row = _with_member(row, archive, member, ending)
    if row is not None:
        yield number, row


def _with_member(row: Any, archive: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> Any:
    """The row with one more member, or the first reason why not."""
    if isinstance(row, RowError):
        return row
    shown = repr(member.name[:120])
    if not member.isfile():
        return RowError(f"member {shown} is a link or a device, not a file")
    if member.size > MAX_MEMBER_BYTES:
        return RowError(f"member {shown} has {member.size} bytes, more than {MAX_MEMBER_BYTES}")
    if ending in row:
        return RowError(f"two members {shown}")
    file = archive.extractfile(member)
    return row | {ending: file.read() if file else b""}


def _read_list(path: Path, part: Part) -> Iterator[tuple[int, Any]]:
    """Texts of a JSON list's items, read through a window, so that memory holds a few of them."""
    decoder, number = json.JSONDecoder(), part.first_row
    with path.open(encoding="utf-8") as file:
        window = _Window(path, file)
        if window.next_character() != "[":
            raise DataError(f"{path} is no list. A file of rows is a list: [{{...}}, ...]")
        window.skip(1)
        if window.next_character() != "]":
            while True:
                yield number, window.take_value(decoder)
                number += 1
                mark = window.next_character()
                window.skip(1)
                if mark == "]":
                    break
                if mark != ",":
                    window.fail("a comma or ] was expected")
        else:
            window.skip(1)
        if window.next_character():
            window.fail("text after the end of the list")


class _Window:
    """Text of a file from a position on; more is read when it is needed, what was used is dropped."""

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file
        self._text, self._place, self._line = "", 0, 1

    def next_character(self) -> str:
        """The next one that is no white space, not taken; "" at the end of the file."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in " \t\r\n\ufeff":
                self._place += 1
            if self._place < len(self._text) or not self._more():
                return self._text[self._place : self._place + 1]

    def skip(self, count: int) -> None:
        """Take characters."""
        self._place += count

    def take_value(self, decoder: json.JSONDecoder) -> bytes:
        """Take the text of one JSON value. A number counts only with something behind it: it could go on."""
        self.next_character()
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._place)
            except RecursionError:
                raise DataError(f"{self._path}, line {self._line}: nested too deeply for a row of text") from None
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - CUT_CHARS
                if not is_cut or not self._more():
                    self.fail(error.msg, error.pos)
                continue
            except ValueError as error:  # a number of thousands of digits
                self.fail(str(error))
            is_whole = not isinstance(value, int | float) or self._text[end : end + 1] in SEPARATORS
            if is_whole or not self._more():
                text, self._place = self._text[self._place : end], end
                return text.encode()

    def fail(self, reason: str, place: int | None = None) -> None:
        """Raise DataError with the line of `place`, by default of the present one."""
        line = self._line + self._text.count("\n", 0, self._place if place is None else place)
        raise DataError(f"{self._path}, line {line}: not JSON ({reason}). Correct the file")

    def _more(self) -> bool:
        if len(self._text) - self._place > MAX_ROW_CHARS:
            self.fail(f"a row of more than {MAX_ROW_CHARS} characters")
        try:
            text = self._file.read(max(TEXT_CHARS, len(self._text) - self._place))
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}: not UTF-8 text ({error.reason}). Save the file as UTF-8") from None
        self._line += self._text.count("\n", 0, self._place)
        self._text, self._place = self._text[self._place :] + text, 0
        return bool(text)
