"""Shards of a feature cache as files: written whole, listed, and checked. No torch: Ray Data's coordinators read it.

    FINGERPRINT/meta.json       fingerprint and shape [P, D]
    FINGERPRINT/NAME.bin        uint16 [n, P, D] (the bits of bfloat16)
    FINGERPRINT/NAME.json       digests of the rows and the sha256 of digests and bits; written last

NAME is the start of that sha256, so two writers of one name write the same bytes. A shard is readable when its index
can be read and its data have the size that the index says; anything else on disk is as if it were not there. The
sha256 is compared by `verify` only: reading all of a cache at every start would cost more than it saves.
"""

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minivlm.data.errors import DataError
from minivlm.storage import write_bytes, write_json

META = "meta.json"
NAME_DIGITS = 20
LISTINGS = 5
"""How often a folder is listed again where files vanish meanwhile (a dangling link vanishes for ever)."""


class BrokenShard(ValueError):
    """An index or its data are torn; the text is the reason."""


@dataclass(frozen=True)
class Shard:
    """One readable shard."""

    index: Path
    digests: tuple[str, ...]
    sha256: str | None
    """Of digests and bits. None where an older version wrote the shard: it is readable, but cannot be verified."""

    shape: tuple[int, int]
    """(P, D) of one row."""

    @property
    def data(self) -> Path:
        """The file of the rows."""
        return self.index.with_suffix(".bin")

    @property
    def num_bytes(self) -> int:
        """Size of the rows."""
        return len(self.digests) * 2 * math.prod(self.shape)

    def rows(self) -> np.ndarray:
        """uint16 [n, P, D], memory-mapped."""
        return np.asarray(np.memmap(self.data, np.uint16, mode="r", shape=(len(self.digests), *self.shape)))

    def is_sound(self) -> bool | None:
        """Whether digests and bits are those that were written; None where no checksum was."""
        return None if self.sha256 is None else checksum(self.digests, self.rows()) == self.sha256


def read_meta(directory: Path) -> tuple[str, tuple[int, int]]:
    """Fingerprint and (P, D) of a cache's folder.

    Raises:
        DataError: no cache there, or its meta.json is damaged.
    """
    path = Path(directory) / META
    try:
        stored = json.loads(path.read_text())
        tokens, width = stored["shape"]
        return str(stored["fingerprint"]), (int(tokens), int(width))
    except FileNotFoundError:
        raise DataError(f"No image features under {directory}. Run: python -m jobs.prepare") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged. Delete {directory} and encode again: python -m jobs.prepare") from None


def write_meta(directory: Path, fingerprint: str, shape: tuple[int, int]) -> None:
    """Begin a cache."""
    write_json(Path(directory) / META, {"fingerprint": fingerprint, "shape": list(shape)})


def checksum(digests: Sequence[str], rows: np.ndarray) -> str:
    """Hex sha256 of the rows' names and bits."""
    digest = hashlib.sha256("\n".join(digests).encode())
    digest.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def write_shard(directory: Path, digests: Sequence[str], rows: np.ndarray) -> Path:
    """Commit uint16 rows [n, P, D]: data first, index last, each by fsync and rename. Returns the index's path."""
    found = checksum(digests, rows)
    stem = Path(directory) / found[:NAME_DIGITS]
    write_bytes(stem.with_suffix(".bin"), np.ascontiguousarray(rows).tobytes())
    write_json(stem.with_suffix(".json"), {"digests": list(digests), "sha256": found})
    return stem.with_suffix(".json")


def index_files(directory: Path) -> list[Path]:
    """Indexes of all shards, whole or torn, by name."""
    return sorted(path for path in Path(directory).glob("*.json") if path.name != META)


def read_shard(index: Path, shape: tuple[int, int]) -> Shard:
    """Read an index and check the size of its data.

    Raises:
        BrokenShard: torn.
        FileNotFoundError: the index is gone since it was listed.
    """
    try:
        stored = json.loads(index.read_bytes())
        digests, found = stored["digests"], stored.get("sha256")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenShard(f"the index cannot be read ({type(error).__name__})") from None
    if not isinstance(digests, list) or not all(isinstance(digest, str) for digest in digests) or not digests:
        raise BrokenShard("the index does not list digests")
    if found is not None and not isinstance(found, str):
        raise BrokenShard("the index has a checksum that is no text")
    shard = Shard(index, tuple(digests), found, shape)
    try:
        size = shard.data.stat().st_size
    except FileNotFoundError:
        raise BrokenShard("the data file is missing") from None
    if size != shard.num_bytes:
        raise BrokenShard(f"the data file has {size} bytes instead of {shard.num_bytes}")
    return shard


def list_shards(directory: Path, shape: tuple[int, int], *, known: Collection[str] = ()) -> Iterator[Shard]:
    """Readable shards whose index is not among the file names `known`.

    Prune writes the rows that it keeps under a new name before it removes the old one: where an index vanished
    between listing and reading, the folder is listed again, so that no picture is missed.
    """
    seen = set(known)
    for _ in range(LISTINGS):
        vanished = False
        for index in index_files(directory):
            if index.name in seen:
                continue
            try:
                shard = read_shard(index, shape)
            except FileNotFoundError:
                vanished = True
                continue
            except BrokenShard:
                vanished = vanished or not index.exists()
                continue
            seen.add(index.name)
            yield shard
        if not vanished:
            return


def committed_digests(directory: Path) -> set[str]:
    """Pictures that a cache can give.

    Raises:
        DataError: no cache there.
    """
    _, shape = read_meta(directory)
    return {digest for shard in list_shards(directory, shape) for digest in shard.digests}
