"""Features of everything that questions show: pictures of prepared rows, and those that only a benchmark has."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from minivlm.config import Config
from minivlm.data.encode import encode_images
from minivlm.data.features import FeatureCache
from minivlm.data.pictures import PicturePaths
from minivlm.data.pipeline import encoding, prepare_features
from minivlm.evaluation.tasks import Question
from minivlm.layout import pictures_dir, tower_path
from minivlm.storage import content_hash


def prepare_pictures(config: Config, questions: Sequence[Question], shown: Collection[str]) -> FeatureCache:
    """Encode what the cache lacks.

    Args:
        questions: they say where a benchmark's pictures lie.
        shown: digests that are about to be read.

    Raises:
        DataError: a file is no longer what it was when the rows were validated.
    """
    outside = {
        digest: path
        for question in questions
        if question.source
        for digest, path in zip(question.image_sha256, question.images, strict=True)
        if digest in shown
    }
    cache = prepare_features(config, tower_path(config), [digest for digest in shown if digest not in outside])
    if cache.missing(outside):
        listed = pictures_dir(config) / "listed" / content_hash(sorted(outside.items()))
        paths = PicturePaths(listed) if listed.is_dir() else PicturePaths.write(listed, outside)
        encode_images(outside, cache, replace(encoding(config, tower_path(config), cache), pictures=paths.directory))
    return cache
