"""Patch features on disk, by picture digest: the vision tower never runs twice on the same image.

    FINGERPRINT/meta.json            shape
    FINGERPRINT/NAME.bin             uint16 [n, P, D] (the bits of bfloat16)
    FINGERPRINT/NAME.json            digests of the rows; written last, so a shard without it does not exist

Any number of processes may append at once: each append is a shard of its own. A shard whose size is not what its
index says (a torn copy) is treated as absent and its pictures as missing.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minivlm.data.errors import DataError
from minivlm.storage import write_bytes, write_json


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
        meta = self.directory / "meta.json"
        if not meta.exists():
            write_json(meta, {"fingerprint": fingerprint, "shape": list(self.shape)})
        stored = tuple(json.loads(meta.read_text())["shape"])
        if stored != self.shape:
            raise DataError(
                f"{meta} holds features of shape {stored}, the tower gives {self.shape}. Delete {self.directory}"
            )
        self.refresh()

    @classmethod
    def open(cls, directory: Path) -> "FeatureCache":
        """Open an existing cache by its own folder.

        Raises:
            DataError: no cache there.
        """
        meta = Path(directory) / "meta.json"
        try:
            stored = json.loads(meta.read_text())
        except FileNotFoundError:
            raise DataError(f"No image features under {directory}. Run: python -m jobs.prepare") from None
        return cls(Path(directory).parent, stored["fingerprint"], tuple(stored["shape"]))

    def refresh(self) -> None:
        """Read the indexes that appeared since the last look."""
        for path in sorted(self.directory.glob("*.json")):
            if path.name == "meta.json" or path.name in self._read:
                continue
            digests = json.loads(path.read_text())["digests"]
            shape = (len(digests), *self.shape)
            data = path.with_suffix(".bin")
            if not data.exists() or data.stat().st_size != 2 * int(np.prod(shape)):
                continue
            self._read.add(path.name)
            self._shards.append(np.asarray(np.memmap(data, np.uint16, mode="r", shape=shape)))
            self._encoded += len(digests)
            for row, digest in enumerate(digests):
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
        name = hashlib.sha256("".join(digests).encode()).hexdigest()[:20]
        bits = features.detach().cpu().contiguous().view(torch.uint16).numpy()
        write_bytes(self.directory / f"{name}.bin", bits.tobytes())
        write_json(self.directory / f"{name}.json", {"digests": list(digests)})
        self.refresh()

    def get(self, digests: Sequence[str]) -> Tensor:
        """Features in the order asked: [n, P, D] bfloat16.

        Raises:
            DataError: a picture was never encoded.
        """
        if any(digest not in self._place for digest in digests):
            self._require(digests)
        out = np.empty((len(digests), *self.shape), np.uint16)
        for index, digest in enumerate(digests):
            shard, row = self._place[digest]
            out[index] = self._shards[shard][row]
        return torch.from_numpy(out).view(torch.bfloat16)

    def stat(self) -> CacheStat:
        """Counts over all shards."""
        self.refresh()
        return CacheStat(len(self._place), self._encoded, sum(shard.nbytes for shard in self._shards))

    def _require(self, digests: Sequence[str]) -> None:
        absent = self.missing(digests)
        if absent:
            raise DataError(
                f"{len(absent)} of {len(digests)} pictures have no features in {self.directory} (first: {absent[0]}). "
                "Encode them: python -m jobs.prepare"
            )
