"""Vision tower actors: pictures that have no features yet -> the feature cache, by Ray Data.

Each actor call encodes one shard of pictures and commits it, so a kill costs at most the shards in the making.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch

from minivlm.data.errors import DataError
from minivlm.data.features import FeatureCache
from minivlm.data.images import BadImage, ImageLimits, read_image
from minivlm.log import Progress

if TYPE_CHECKING:
    from minivlm.model.vision import VisionTower

PICTURES_PER_SHARD = 512


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


def encode_images(
    pictures: Mapping[str, str], cache: FeatureCache, tower: Tower, encoders: Encoders, limits: ImageLimits
) -> int:
    """Encode the pictures that the cache lacks; returns how many that were.

    Args:
        pictures: path by digest.

    Raises:
        DataError: a file is no longer what it was when the rows were validated.
    """
    missing = cache.missing(pictures)
    if not missing:
        return 0
    rows = [{"sha256": digest, "path": pictures[digest]} for digest in missing]
    num_shards = -(-len(rows) // PICTURES_PER_SHARD)
    dataset = ray.data.from_items(rows, override_num_blocks=num_shards).map_batches(
        Encoder,
        fn_constructor_args=(str(cache.directory), tower, encoders, limits),
        batch_size=None,
        num_cpus=encoders.cpus,
        num_gpus=encoders.gpus,
        compute=ray.data.ActorPoolStrategy(size=min(encoders.count, num_shards)),
    )
    dataset.context.enable_progress_bars = False
    encoded = 0
    with Progress(len(missing), "encode pictures") as progress:
        for row in dataset.iter_rows():
            if row["error"]:
                raise DataError(row["error"])
            encoded += row["encoded"]
            progress.update(row["encoded"])
    return encoded


class Encoder:
    """Ray Data UDF: {sha256, path} of one shard -> {encoded, error}; the features go to the cache."""

    def __init__(self, directory: str, tower: Tower, encoders: Encoders, limits: ImageLimits) -> None:
        torch.set_num_threads(encoders.threads)
        self._tower = tower.load("cuda" if encoders.gpus else "cpu")
        self._cache = FeatureCache.open(Path(directory))
        self._limits = limits
        if self._tower.fingerprint != self._cache.fingerprint:
            raise DataError(f"the tower at {tower.path} changed while it was in use. Run the prepare job again")

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Encode one shard; pictures that another process committed meanwhile are left out."""
        paths = dict(zip(batch["sha256"].tolist(), batch["path"].tolist(), strict=True))
        missing = self._cache.missing(paths)
        features = []
        try:
            for start in range(0, len(missing), self._tower.batch_size):
                chunk = missing[start : start + self._tower.batch_size]
                images = [self._read(Path(paths[digest]), digest) for digest in chunk]
                features.append(self._tower.encode(self._tower.preprocess(images)))
        except DataError as error:
            return {"encoded": [0], "error": [str(error)]}
        if features:
            self._cache.append(missing, torch.cat(features))
        return {"encoded": [len(missing)], "error": [""]}

    def _read(self, path: Path, digest: str) -> Any:
        try:
            image, found = read_image(path, self._limits)
        except BadImage as error:
            raise DataError(f"{path}: {error}, though it was fine when rows were validated. Prepare again") from None
        if found != digest:
            raise DataError(f"{path} changed since the rows were validated. Prepare again: touch the data file first")
        return image
