"""Features of everything that is shown: pictures of prepared rows, and those that lie elsewhere."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from minivlm.config import Config
from minivlm.data.encode import encode_images
from minivlm.data.features import FeatureCache
from minivlm.data.pictures import PicturePaths
from minivlm.data.pipeline import encoding, prepare_features
from minivlm.layout import pictures_dir, tower_path
from minivlm.storage import content_hash


def prepare_pictures(config: Config, elsewhere: Mapping[str, str], shown: Collection[str]) -> FeatureCache:
    """Encode what the cache lacks.

    Args:
        elsewhere: digest -> path of pictures that no prepared row has: a benchmark's, and those made worse.
        shown: digests that are about to be read.

    Raises:
        DataError: a file is no longer what it was when it was validated.
    """
    outside = {digest: path for digest, path in elsewhere.items() if digest in shown}
    cache = prepare_features(config, tower_path(config), [digest for digest in shown if digest not in outside])
    if cache.missing(outside):
        listed = pictures_dir(config) / "listed" / content_hash(sorted(outside.items()))
        paths = PicturePaths(listed) if listed.is_dir() else PicturePaths.write(listed, outside)
        encode_images(outside, cache, replace(encoding(config, tower_path(config), cache), pictures=paths.directory))
    return cache
