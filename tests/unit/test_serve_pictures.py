"""Pictures of every odd kind: the encoder actors' way and the endpoint's way give the same tensor."""

import asyncio
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minivlm.data.encoder import Encoders, Encoding, PictureEncoder, Tower
from minivlm.data.features import FeatureCache
from minivlm.data.images import ImageLimits, open_image, read_image
from minivlm.data.pictures import PicturePaths
from minivlm.schema import Message
from minivlm.serve.engine import Engine
from minivlm.serve.media import decode_data_url
from tests.tiny_export import build_export, data_url

LIMITS = ImageLimits(max_bytes=1_000_000, max_pixels=25_000_000, max_side=8192, max_aspect=20.0)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees
    return exif


def clear() -> Image.Image:
    picture = NOISE.convert("P")
    picture.info["transparency"] = 3
    return picture


GREY = NOISE.convert("L")
KINDS = {
    "jpeg": encode(NOISE, "JPEG"),
    "jpeg with exif orientation": encode(NOISE, "JPEG", exif=turned()),
    "cmyk": encode(NOISE.convert("CMYK"), "JPEG"),
    "16-bit": encode(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "PNG"),
    "palette": encode(NOISE.convert("P"), "PNG"),
    "palette with a clear entry": encode(clear(), "PNG", transparency=3),
    "alpha": encode(Image.merge("RGBA", [*NOISE.split(), GREY]), "PNG"),
    "grey": encode(GREY, "PNG"),
    "grey with alpha": encode(Image.merge("LA", [GREY, GREY]), "PNG"),
    "bits": encode(NOISE.convert("1"), "PNG"),
    "gif": encode(NOISE, "GIF", save_all=True, append_images=[Image.new("RGB", NOISE.size)]),
    "webp": encode(NOISE, "WEBP", save_all=True, append_images=[Image.new("RGB", NOISE.size)], lossless=True),
}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return build_export(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(export: Path) -> Iterator[Engine]:
    settings: dict[str, Any] = {"encode_precision": "float32", "device": "cpu", "max_requests": 4, "timeout_s": 30.0}
    engine = Engine(export, limits=LIMITS, **settings)
    yield engine
    engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_serving_see_the_same_tensor(engine: Engine, export: Path, kind: str, tmp_path: Path):
    data = KINDS[kind]
    (tmp_path / "picture").write_bytes(data)
    trained, digest = read_image(tmp_path / "picture", LIMITS)
    served = open_image(decode_data_url(data_url(data), max_bytes=LIMITS.max_bytes), LIMITS)
    tower = Tower(str(export.parent / "clip"), "float32", -1, batch_size=1)  # as the engine's
    loaded = tower.load("cpu")
    assert torch.equal(loaded.preprocess([trained]), engine.tower.preprocess([served]))
    assert float(loaded.preprocess([trained]).std()) > 0.1  # it shows something

    cache = FeatureCache(tmp_path / "features", loaded.fingerprint, (loaded.num_features, loaded.hidden_size))
    paths = PicturePaths.write(tmp_path / "paths", {digest: str(tmp_path / "picture")})
    actors = Encoders(1, 1.0, 0.0, threads=1)
    PictureEncoder(Encoding(tower, actors, LIMITS, paths.directory, cache.directory)).encode([digest])
    prompt = asyncio.run(engine.prepare([Message("user", "<image>\n?")], [data]))
    assert torch.equal(cache.get((digest,)), prompt.image_features)


def test_orientation_and_transparency_are_seen(engine: Engine):
    upright, rotated = (open_image(KINDS[kind], LIMITS) for kind in ("jpeg", "jpeg with exif orientation"))
    assert (upright.size, rotated.size) == ((60, 40), (40, 60))
    assert not torch.equal(engine.tower.preprocess([upright]), engine.tower.preprocess([rotated]))
