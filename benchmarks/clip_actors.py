"""Pictures per second through the encoder actors: JPEG files on disk to features in the cache.

    python -m benchmarks.clip_actors [--precision bfloat16] [--actors 2] [--threads 1]

CLIP ViT-B/32's shapes with random weights, 640 x 480 JPEGs of noise and shapes; decoding, preprocessing and the commit
to the cache are included, the start of cluster and actors is shown apart (by encoding a batch with each actor first).
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from benchmarks.machine import Limits, describe, measure_limits, median_seconds
from minivlm.config import load_config
from minivlm.data.encode import encode_images
from minivlm.data.encoder import Encoders, Encoding, Tower
from minivlm.data.features import FeatureCache
from minivlm.data.images import read_image
from minivlm.data.pictures import PicturePaths
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


@dataclass(frozen=True)
class Rates:
    """Pictures per second."""

    actors: float
    """Files to cache, through Ray Data."""

    tower: float
    """Ready pixels to features, in one process with the threads of one actor."""

    start_s: float
    """The actors, a batch of each included; not in `actors`."""

    def describe(self, limits: Limits, precision: str) -> str:
        """One line."""
        rate, peak = self.actors * VIT_B32_GFLOP, limits.matmul_gflops[precision]
        return (
            f"{self.actors:.1f} pictures/s ({precision}) after a start of {self.start_s:.1f} s, "
            f"{rate:.0f} GFLOP/s = {rate / peak:.0%} of the product; "
            f"the tower of one actor alone {self.tower:.1f} pictures/s"
        )


def main() -> None:
    """Measure and print."""
    arguments = parse()
    limits = measure_limits(torch.device("cpu"), threads=arguments.actors * arguments.threads)
    print(describe(limits, torch.device("cpu")), flush=True)
    print(measure(arguments).describe(limits, arguments.precision))


def measure(arguments: argparse.Namespace) -> Rates:
    """Write pictures and a tower, encode them on a local cluster; a minute or more."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = load_config(Path("configs/minimind-v-v1-small.yaml"), [f"storage_path={folder}"])
        write_tower(folder / "tower")
        num_first = arguments.actors * arguments.batch
        paths = write_pictures(folder / "pictures", 2 * num_first + arguments.pictures)
        torch.set_num_threads(arguments.threads)  # of the tower alone
        settings = Tower(str(folder / "tower"), arguments.precision, -1, arguments.batch)
        tower = settings.load("cpu")
        cache = FeatureCache(folder / "features", tower.fingerprint, (tower.num_features, tower.hidden_size))
        seconds = plain_seconds(tower, paths[0])
        pictures = {read_image(path, image_limits(config))[1]: str(path) for path in paths}
        PicturePaths.write(folder / "paths", pictures)
        encoders = Encoders(arguments.actors, 1.0, 0.0, arguments.threads)
        encoding = Encoding(settings, encoders, image_limits(config), folder / "paths", cache.directory)
        times = []
        connect(config)
        try:
            for part in (list(pictures)[:num_first], list(pictures)[: 2 * num_first], pictures):
                started = time.perf_counter()
                encode_images(part, cache, encoding)
                times.append(time.perf_counter() - started)
        finally:
            disconnect()
    num_counted = arguments.pictures - num_first  # every run starts its actors; the first also Ray Data's own
    return Rates(num_counted / (times[2] - times[1]), arguments.batch / seconds, times[1])


def plain_seconds(tower: VisionTower, path: Path) -> float:
    """Median time of one batch of ready pixels in this process."""
    with Image.open(path) as picture:
        pixel_values = tower.preprocess([picture.convert("RGB")] * tower.batch_size)
    return median_seconds(lambda: tower.encode(pixel_values), torch.device("cpu"), repeats=3)


def parse(command_line: list[str] | None = None) -> argparse.Namespace:
    """Arguments, by default those of this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16, help="fixed batch of the tower")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of one actor")
    return parser.parse_args(command_line)


if __name__ == "__main__":
    main()
