"""Files that are either complete or absent: content hashes, atomic writes, and directories committed by rename."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any


def content_hash(value: Any) -> str:
    """First 10 hex digits of the sha256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_of(folder: Path) -> Path | None:
    """The manifest.json beside an export folder, if it is this folder's: None unless its `files` names each of the
    folder's safetensors with the sha256 that they have. Any other file of that name says nothing about the weights."""
    path = folder.parent / "manifest.json"
    weights = sorted(folder.glob("*.safetensors"))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    files = found.get("files") if isinstance(found, dict) else None
    if not weights or not isinstance(files, dict):
        return None
    is_own = all(files.get(f"{folder.name}/{file.name}") == _sha256_as_of(file, *_state(file)) for file in weights)
    return path if is_own else None


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=256)
def _sha256_as_of(file: Path, size: int, time_ns: int) -> str:
    """`file_sha256`, read once as long as size and time stay: names of folders are asked for often."""
    return file_sha256(file)


def write_bytes(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write under a temporary name in the same folder, fsync, rename: readers see all of it or nothing.

    Args:
        sync: False saves milliseconds where a file lost in a power cut would be noticed and made again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")  # pids repeat across nodes
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of indented JSON, Chinese left readable."""
    write_bytes(path, json.dumps(value, indent=1, ensure_ascii=False).encode())


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success it becomes `path`, on an error it is removed.

    An existing `path` is kept, and the new content dropped: names carry the hash of what determines them.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
