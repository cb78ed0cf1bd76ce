"""Pictures per second through the encoder actors: JPEG files on disk to features in the cache.

    python -m benchmarks.clip_actors [--precision bfloat16] [--pictures 512]

CLIP ViT-B/32's shapes with random weights, 640 x 480 JPEGs of noise and shapes; decoding, preprocessing and the commit
to the cache are included, the start of cluster and actors is shown apart (by encoding one picture first).
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from benchmarks.machine import describe, measure_limits
from minivlm.config import load_config
from minivlm.data.encode import Encoders, Tower, encode_images
from minivlm.data.features import FeatureCache
from minivlm.data.images import read_image
from minivlm.data.settings import image_limits
from minivlm.model.clip import build_clip, save_clip
from minivlm.model.vision import VisionTower
from minivlm.workflow.cluster import connect, disconnect

VIT_B32_GFLOP = 8.7
"""Of one picture: 2 x 50 tokens x 87M parameters, and attention."""


def write_pictures(folder: Path, count: int) -> list[Path]:
    """Smooth random JPEGs of 640 x 480 px, about 60 kB each."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    paths = []
    for index in range(count):
        small = random.integers(0, 256, (60, 80, 3), np.uint8)
        picture = Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC).filter(ImageFilter.DETAIL)
        paths.append(folder / f"{index:06d}.jpg")
        picture.save(paths[-1], quality=90)
    return paths


def write_tower(folder: Path) -> None:
    """A CLIP ViT-B/32 with random weights and a very small text side."""
    tower = build_clip(
        image_size=224, patch_size=32, vision_hidden_size=768, vision_layers=12, vision_heads=12,
        text_hidden_size=16, text_layers=1, text_heads=1, max_text_tokens=16, projection_dim=16, vocab_size=300,
        bos_token_id=1, eos_token_id=0, pad_token_id=0, seed=0,
    )  # fmt: skip
    save_clip(tower, folder)


def main() -> None:
    """Measure and print."""
    arguments = _parse()
    limits = measure_limits(torch.device("cpu"), threads=arguments.threads)
    print(describe(limits, torch.device("cpu")), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = load_config(Path("configs/minimind-v-v1-small.yaml"), [f"storage_path={folder}"])
        write_tower(folder / "tower")
        paths = write_pictures(folder / "pictures", arguments.pictures + 1)
        settings = Tower(str(folder / "tower"), arguments.precision, -1, arguments.batch)
        tower = settings.load("cpu")
        cache = FeatureCache(folder / "features", tower.fingerprint, (tower.num_image_tokens, tower.hidden_size))
        seconds = plain_seconds(tower, paths[0])
        pictures = {read_image(path, image_limits(config))[1]: str(path) for path in paths}
        first = dict(list(pictures.items())[:1])
        encoders = Encoders(arguments.actors, 1.0, 0.0, arguments.threads)
        connect(config)
        try:
            started = time.perf_counter()
            encode_images(first, cache, settings, encoders, image_limits(config))
            start_s = time.perf_counter() - started
            started = time.perf_counter()
            encode_images(pictures, cache, settings, encoders, image_limits(config))
            total_s = time.perf_counter() - started
        finally:
            disconnect()
    rate = arguments.pictures / (total_s - start_s)
    peak = limits.matmul_gflops[arguments.precision]
    print(
        f"{arguments.pictures} pictures, {arguments.precision}: {rate:.1f}/s after a start of {start_s:.1f} s; "
        f"{rate * VIT_B32_GFLOP:.0f} GFLOP/s = {rate * VIT_B32_GFLOP / peak:.0%} of the {arguments.precision} product; "
        f"the tower alone {arguments.batch / seconds:.1f} pictures/s"
    )


def plain_seconds(tower: VisionTower, path: Path) -> float:
    """Median time of one batch of ready pixels in this process."""
    from benchmarks.machine import median_seconds

    with Image.open(path) as picture:
        pixel_values = tower.preprocess([picture.convert("RGB")] * tower.batch_size)
    return median_seconds(lambda: tower.encode(pixel_values), torch.device("cpu"), repeats=3)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16, help="fixed batch of the tower")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="torch threads of one actor")
    return parser.parse_args()


if __name__ == "__main__":
    main()
