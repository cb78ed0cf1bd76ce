"""Patch features on disk, by picture digest: the vision tower never runs twice on the same image.

The files are those of `minivlm.data.shards`. Any number of processes may append at once: each append is a shard of its
own. A torn shard (a killed writer, a copy cut short) is treated as absent and its pictures as missing.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minivlm.data.errors import DataError
from minivlm.data.shards import META, list_shards, read_meta, write_meta, write_shard

POLL_S = 0.05
"""Pause between two looks for pictures that another process is encoding."""


@dataclass(frozen=True)
class CacheStat:
    """`distinct` pictures readable, `encoded` rows ever committed (equal: nothing was encoded twice), bytes on disk."""

    distinct: int
    encoded: int
    num_bytes: int


class FeatureCache:
    """One tower's features. `shape` = (P, D): image tokens, tower width."""

    def __init__(self, root: Path, fingerprint: str, shape: tuple[int, int]) -> None:
        self.fingerprint = fingerprint
        self.directory = Path(root) / fingerprint
        self.shape = (int(shape[0]), int(shape[1]))
        self._place: dict[str, tuple[int, int]] = {}
        self._shards: list[np.ndarray] = []
        self._read: set[str] = set()
        self._encoded = 0
        if not (self.directory / META).exists():
            write_meta(self.directory, fingerprint, self.shape)
        _, stored = read_meta(self.directory)
        if stored != self.shape:
            raise DataError(
                f"{self.directory / META} holds features of shape {stored}, the tower gives {self.shape}. "
                f"Delete {self.directory}"
            )
        self.refresh()

    @classmethod
    def open(cls, directory: Path) -> "FeatureCache":
        """Open an existing cache by its own folder.

        Raises:
            DataError: no cache there, or its meta.json is damaged.
        """
        fingerprint, shape = read_meta(directory)
        return cls(Path(directory).parent, fingerprint, shape)

    def refresh(self) -> None:
        """Map the shards that appeared since the last look."""
        for shard in list_shards(self.directory, self.shape, known=self._read):
            try:
                rows = shard.rows()
            except (FileNotFoundError, ValueError):  # removed, or cut, since it was listed
                continue
            self._read.add(shard.index.name)
            self._shards.append(rows)
            self._encoded += len(shard.digests)
            for row, digest in enumerate(shard.digests):
                self._place.setdefault(digest, (len(self._shards) - 1, row))

    def missing(self, digests: Iterable[str]) -> list[str]:
        """Distinct digests that have no features yet, in the order given."""
        self.refresh()
        return [digest for digest in dict.fromkeys(digests) if digest not in self._place]

    def append(self, digests: Sequence[str], features: Tensor) -> None:
        """Commit the features of new pictures as one shard.

        Args:
            features: [n, P, D] bfloat16.

        Raises:
            ValueError: wrong shape or type, or a digest twice.
        """
        if features.shape != (len(digests), *self.shape) or features.dtype != torch.bfloat16:
            raise ValueError(
                f"features {tuple(features.shape)} {features.dtype} for {len(digests)} pictures of {self.shape}"
            )
        if len(set(digests)) != len(digests):
            raise ValueError("a picture stands twice in one append")
        if not digests:
            return
        write_shard(self.directory, digests, features.detach().cpu().contiguous().view(torch.uint16).numpy())
        self.refresh()

    def get(self, digests: Sequence[str], *, wait_s: float = 0.0) -> Tensor:
        """Features in the order asked: [n, P, D] bfloat16.

        Args:
            wait_s: how long to look again for pictures that another process is encoding, in seconds.

        Raises:
            DataError: a picture was never encoded.
        """
        if any(digest not in self._place for digest in digests):
            self._require(digests, time.monotonic() + wait_s)
        out = np.empty((len(digests), *self.shape), np.uint16)
        for index, digest in enumerate(digests):
            shard, row = self._place[digest]
            out[index] = self._shards[shard][row]
        return torch.from_numpy(out).view(torch.bfloat16)

    def stat(self) -> CacheStat:
        """Counts over all shards."""
        self.refresh()
        return CacheStat(len(self._place), self._encoded, sum(shard.nbytes for shard in self._shards))

    def _require(self, digests: Sequence[str], deadline: float) -> None:
        while absent := self.missing(digests):
            if time.monotonic() >= deadline:
                raise DataError(
                    f"{len(absent)} of {len(digests)} pictures have no features in {self.directory} "
                    f"(first: {absent[0]}). Encode them: python -m jobs.prepare"
                )
            time.sleep(POLL_S)
