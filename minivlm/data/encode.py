"""Vision tower actors: pictures that have no features yet -> the feature cache, by Ray Data.

Each actor call encodes one shard of pictures and commits it, so a kill costs at most the shards in the making.
"""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import ray

from minivlm.data.encoder import Encoding, PictureEncoder, cut_shards
from minivlm.data.errors import DataError
from minivlm.data.features import FeatureCache
from minivlm.data.stream import from_tables
from minivlm.log import Progress


def encode_images(digests: Iterable[str], cache: FeatureCache, encoding: Encoding) -> int:
    """Encode the pictures that the cache lacks; returns how many that were.

    Raises:
        DataError: a file is no longer what it was when the rows were validated.
    """
    missing = cache.missing(digests)
    if not missing:
        return 0
    encoders = encoding.encoders
    shards = cut_shards(missing, encoders.count, encoding.tower.batch_size)
    dataset = from_tables([pa.table({"sha256": shard}) for shard in shards]).map_batches(
        Encoder,
        fn_constructor_args=(encoding,),
        batch_size=None,
        num_cpus=encoders.cpus,
        num_gpus=encoders.gpus,
        compute=ray.data.ActorPoolStrategy(  # the actor that is up first would else take two shards
            size=min(encoders.count, len(shards)), max_tasks_in_flight_per_actor=1
        ),
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
    """Ray Data UDF: {sha256} of one shard -> {encoded, error}; the features go to the cache."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoder = PictureEncoder(encoding)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Encode one shard; pictures that another process committed meanwhile are left out."""
        try:
            return {"encoded": [self._encoder.encode(batch["sha256"].tolist())], "error": [""]}
        except DataError as error:
            return {"encoded": [0], "error": [str(error)]}
