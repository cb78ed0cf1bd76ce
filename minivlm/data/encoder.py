"""Encoding pictures into a feature cache, as encoder actors do it: files -> tower -> committed shards.

One class does it in both modes of `data.features`: an actor of `encode_images` gets lists of pictures, an actor in
front of the tasks that make batches gets blocks of the plan. Imports neither Ray nor, at import, torch: Ray Data's
coordinators unpickle these names.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from minivlm.data.errors import DataError
from minivlm.data.images import ImageLimits, read_validated_image
from minivlm.data.pictures import PicturePaths

if TYPE_CHECKING:
    from minivlm.model.vision import VisionTower

PICTURES_PER_SHARD = 512
"""A kill costs at most so many pictures per actor."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""From malloc.h; see mallopt(3)."""

ENCODE_COLUMN = "encode"
"""Column of a block: the pictures that are encoded on its way."""


@dataclass(frozen=True)
class Encoders:
    """The actor pool: how many, what each reserves, torch threads of each."""

    count: int
    cpus: float
    gpus: float
    threads: int


@dataclass(frozen=True)
class Tower:
    """What an actor loads. Precision, layer and batch size are part of the features' fingerprint."""

    path: str
    precision: str
    feature_layer: int
    batch_size: int

    def load(self, device: str) -> "VisionTower":
        """The frozen tower on a device."""
        from minivlm.model.vision import VisionTower  # seconds of imports, which only this call needs

        return VisionTower.load(
            self.path,
            precision=self.precision,
            feature_layer=self.feature_layer,
            batch_size=self.batch_size,
            device=device,
        )


@dataclass(frozen=True)
class Encoding:
    """All that turns pictures into features, picklable and plain."""

    tower: Tower
    encoders: Encoders
    limits: ImageLimits
    pictures: Path
    """Folder of `PicturePaths`."""

    cache: Path
    """Folder of the feature cache."""


def cut_shards(digests: Sequence[str], num_actors: int, batch_size: int) -> list[list[str]]:
    """Shards of at most `PICTURES_PER_SHARD` pictures: as few as that takes, or a multiple of the actors if that ends
    sooner. All but the last hold whole batches, because a forward of the fixed batch shape costs the same with fewer.
    """
    unit = min(batch_size, PICTURES_PER_SHARD)
    forwards = -(-len(digests) // unit)
    fewest = -(-forwards // (PICTURES_PER_SHARD // unit))
    even = min(-(-fewest // num_actors) * num_actors, forwards)

    def forwards_of_the_slowest(count: int) -> int:
        return -(-count // num_actors) * -(-forwards // count)

    count = min((fewest, even), key=forwards_of_the_slowest)
    bounds = [shard * forwards // count * unit for shard in range(count + 1)]
    return [list(digests[start:end]) for start, end in pairwise(bounds)]


class PictureEncoder:
    """The tower of one process, and the cache that it fills."""

    def __init__(self, encoding: Encoding) -> None:
        """Load the tower.

        Raises:
            DataError: it is not the one that the cache was made for.
        """
        import torch  # only the actors pay for importing it

        from minivlm.data.features import FeatureCache

        _keep_freed_memory()
        torch.set_num_threads(encoding.encoders.threads)
        self._tower = encoding.tower.load("cuda" if encoding.encoders.gpus else "cpu")
        self._cache = FeatureCache.open(encoding.cache)
        self._limits = encoding.limits
        self._paths = PicturePaths(encoding.pictures)
        if self._tower.fingerprint != self._cache.fingerprint:
            raise DataError(
                f"the tower at {encoding.tower.path} changed while it was in use. Run the prepare job again"
            )

    def encode(self, digests: Sequence[str]) -> int:
        """Encode and commit those pictures that the cache lacks; returns how many that were.

        Raises:
            DataError: a file is no longer what it was when the rows were validated.
        """
        missing = self._cache.missing(digests)
        for start in range(0, len(missing), PICTURES_PER_SHARD):
            self._encode_shard(missing[start : start + PICTURES_PER_SHARD])
        return len(missing)

    def _encode_shard(self, digests: Sequence[str]) -> None:
        import torch

        features = []
        for start in range(0, len(digests), self._tower.batch_size):
            part = digests[start : start + self._tower.batch_size]
            images = [read_validated_image(Path(self._paths[digest]), digest, self._limits) for digest in part]
            features.append(self._tower.encode(self._tower.preprocess(images)))
        self._cache.append(digests, torch.cat(features))


def _keep_freed_memory() -> None:
    """For this process. Else glibc gives a batch's tensors back to the kernel, which clears their pages anew: 8 %."""
    process = ctypes.CDLL(None)
    if hasattr(process, "mallopt"):  # not on other systems
        process.mallopt(M_MMAP_MAX, 0)
        process.mallopt(M_TRIM_THRESHOLD, -1)


class BlockEncoder:
    """Ray Data UDF of stream mode: blocks of the plan pass through, once the pictures that they name are committed."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoder = PictureEncoder(encoding)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Encode what the block names and the cache lacks."""
        for digests in block[ENCODE_COLUMN].to_pylist():
            self._encoder.encode(digests)
        return block.drop_columns([ENCODE_COLUMN])
