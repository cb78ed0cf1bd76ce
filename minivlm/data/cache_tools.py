"""Look after feature caches: count what they hold, compare checksums, remove what nobody reads.

Called by `python -m jobs.features`. Safe beside readers and writers: a file that a reader has mapped stays until it is
closed; rows that are kept are committed under a new name before the old shard goes; an index goes before its data; and
what a writer may still be writing (files younger than MIN_AGE_S) is left alone.
"""

import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from minivlm.data.shards import (
    META,
    BrokenShard,
    Shard,
    index_files,
    list_shards,
    read_meta,
    read_shard,
    write_shard,
)

MIN_AGE_S = 3600.0
"""Torn files and temporaries are removed when nothing wrote to them for so long: an append takes seconds."""


@dataclass(frozen=True)
class CacheReport:
    """What one tower's cache holds."""

    directory: Path
    shards: int
    pictures: int
    rows: int
    num_bytes: int
    """Of readable rows."""

    unverifiable: int
    """Shards without a checksum, from an older version."""

    torn: dict[Path, str]
    """Unreadable index or data, temporaries of writers; with the reason."""

    @property
    def duplicates(self) -> int:
        """Rows of pictures that another row holds too."""
        return self.rows - self.pictures


@dataclass(frozen=True)
class Verified:
    """Outcome of a comparison with the stored checksums."""

    checked: int
    unverifiable: int
    damaged: tuple[Shard, ...]


@dataclass(frozen=True)
class Rewrite:
    """A shard that is replaced by some of its rows, or by none."""

    shard: Shard
    rows: tuple[int, ...]

    @property
    def freed(self) -> int:
        """Bytes of the rows that go."""
        return self.shard.num_bytes * (len(self.shard.digests) - len(self.rows)) // len(self.shard.digests)


@dataclass(frozen=True)
class PrunePlan:
    """What a prune of one cache removes."""

    directory: Path
    leftovers: tuple[Path, ...]
    rewrites: tuple[Rewrite, ...]

    @property
    def freed(self) -> int:
        """Bytes."""
        return sum(_size(path) for path in self.leftovers) + sum(rewrite.freed for rewrite in self.rewrites)

    @property
    def dropped_rows(self) -> int:
        """Rows that go."""
        return sum(len(rewrite.shard.digests) - len(rewrite.rows) for rewrite in self.rewrites)


def caches(root: Path) -> list[Path]:
    """Folders under `root` that are feature caches."""
    return sorted(path.parent for path in Path(root).glob(f"*/{META}"))


def report(directory: Path) -> CacheReport:
    """Count one cache.

    Raises:
        DataError: its meta.json is damaged.
    """
    shards = _shards(directory)
    return CacheReport(
        directory=directory,
        shards=len(shards),
        pictures=len({digest for shard in shards for digest in shard.digests}),
        rows=sum(len(shard.digests) for shard in shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        unverifiable=sum(shard.sha256 is None for shard in shards),
        torn=find_torn(directory),
    )


def find_torn(directory: Path) -> dict[Path, str]:
    """Files that no reader reads, with the reason: torn shards, data without an index, temporaries."""
    _, shape = read_meta(directory)
    torn: dict[Path, str] = {}
    for index in index_files(directory):
        try:
            read_shard(index, shape)
        except FileNotFoundError:
            continue
        except BrokenShard as error:
            torn[index] = str(error)
            if index.with_suffix(".bin").exists():
                torn[index.with_suffix(".bin")] = str(error)
    for data in sorted(Path(directory).glob("*.bin")):
        if not data.with_suffix(".json").exists():
            torn[data] = "data without an index"
    for path in sorted(Path(directory).glob(".*.tmp")):
        torn[path] = "temporary of a writer"
    return torn


def verify(directory: Path) -> Verified:
    """Compare digests and bits of every shard with the checksum in its index.

    Raises:
        DataError: meta.json is damaged.
    """
    sound = []
    for shard in _shards(directory):
        try:
            sound.append((shard, shard.is_sound()))
        except FileNotFoundError:
            continue  # pruned since it was listed
    return Verified(
        checked=sum(found is not None for _, found in sound),
        unverifiable=sum(found is None for _, found in sound),
        damaged=tuple(shard for shard, found in sound if found is False),
    )


def drop(shard: Shard) -> None:
    """Remove a shard: its pictures count as missing from now on, and are encoded again when they are needed."""
    shard.index.unlink(missing_ok=True)  # first: data without an index do not exist
    shard.data.unlink(missing_ok=True)


def plan_prune(directory: Path, *, used: Collection[str] | None = None, min_age_s: float = MIN_AGE_S) -> PrunePlan:
    """What can go: old leftovers, all rows but one of each picture, and pictures that are not `used`.

    Args:
        used: digests of all pictures that are wanted; None = all that are there.
        min_age_s: leftovers younger than this may belong to a living writer and stay.
    """
    newest = time.time() - min_age_s
    leftovers = [path for path in find_torn(directory) if _written(path) < newest]
    rewrites, kept = [], set()
    for shard in _shards(directory):
        rows = []
        for row, digest in enumerate(shard.digests):
            if digest not in kept and (used is None or digest in used):
                kept.add(digest)
                rows.append(row)
        if len(rows) < len(shard.digests):
            rewrites.append(Rewrite(shard, tuple(rows)))
    return PrunePlan(Path(directory), tuple(leftovers), tuple(rewrites))


def prune(plan: PrunePlan) -> list[Rewrite]:
    """Carry out a plan. A kill in between leaves duplicates or leftovers, which the next prune finds.

    Returns:
        What was not done, because the shard is damaged: its rows would get a checksum that calls them sound.
    """
    damaged = []
    written: set[Path] = set()
    for path in plan.leftovers:
        path.unlink(missing_ok=True)
    for rewrite in plan.rewrites:
        shard = rewrite.shard
        if rewrite.rows:
            try:
                if shard.is_sound() is False:
                    damaged.append(rewrite)
                    continue
                kept = list(rewrite.rows)
                written.add(write_shard(plan.directory, [shard.digests[row] for row in kept], shard.rows()[kept]))
            except FileNotFoundError:
                continue  # another prune did it
        if shard.index not in written:  # names are contents: the rows kept of one shard may be all of another
            drop(shard)
    return damaged


def remove_cache(directory: Path) -> None:
    """Remove one tower's cache: meta.json first, so that a folder half removed is no cache."""
    (directory / META).unlink(missing_ok=True)
    shutil.rmtree(directory)


def folder_bytes(directory: Path) -> int:
    """Size of all files of a cache."""
    return sum(_size(path) for path in Path(directory).iterdir() if path.is_file())


def _shards(directory: Path) -> list[Shard]:
    _, shape = read_meta(directory)
    return list(list_shards(directory, shape))


def _written(path: Path) -> float:
    """When it was last written to; never, where a writer removed or renamed it meanwhile."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
