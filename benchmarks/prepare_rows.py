"""Ten times the rows: time per row and peak memory of preparation (validated rows and the token table).

    python -m benchmarks.prepare_rows [--rows 4000]

LLaVA JSON whose rows name four times fewer small JPEGs, as MiniMind-V's do; each size runs in a process of its own with
a cluster of its own that has worked on a few rows before.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure_command import PeakMemory

TINY = Path("configs/tiny.yaml")
ROWS_PER_PICTURE = 4
WORDS = "red blue green small large dog cat house tree stands under near old street"


def write_rows(folder: Path, count: int) -> Path:
    """A LLaVA file of `count` rows with captions of 8 to 24 words, and its pictures of 96 x 96 px."""
    folder.mkdir()
    random = np.random.default_rng(0)
    rows = []
    for index in range(count):
        picture = f"{index // ROWS_PER_PICTURE:06d}.jpg"
        if index % ROWS_PER_PICTURE == 0:
            pixels = random.integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).resize((96, 96)).save(folder / picture)
        caption = " ".join(random.choice(WORDS.split(), random.integers(8, 25)))
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": f"{caption} {index}"}]
        rows.append({"id": str(index), "image": picture, "conversations": turns})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def prepare(small: Path, path: Path) -> float:
    """Seconds of what `jobs.prepare` does with rows: validate them, train the tokenizer, write the token table.

    `small` goes through first, so that the cluster's processes have started.
    """
    from minivlm.config import load_config
    from minivlm.data.pipeline import build_tokens, prepare_samples
    from minivlm.workflow.cluster import connect, disconnect

    seconds = 0.0
    for rows in (small, path):
        source = json.dumps([{"path": str(rows), "split": "train"}])
        sources = [f"data.pretrain={source}", f"data.sft={source}"]
        home = path.with_name(f"home-{rows.parent.name}")
        config = load_config(TINY, [f"storage_path={home}", "tokenizer.vocab_size=600", *sources])
        if rows == small:
            connect(config)
        started = time.monotonic()
        prepare_samples(config)
        build_tokens(config, "pretrain", "train")
        seconds = time.monotonic() - started
    disconnect()
    return seconds


def measure(small: Path, path: Path) -> tuple[float, int]:
    """Seconds, and peak bytes (PSS) of the driver, the cluster and its tasks together, in processes of their own."""
    with PeakMemory(interval_s=2.0) as memory, multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds = pool.apply(prepare, (small, path))
    return seconds, memory.peak_bytes


@dataclass(frozen=True)
class Growth:
    """The larger run over the smaller one."""

    time_per_row: float
    peak_memory: float


def compare(rows: int) -> Growth:
    """Prepare `rows` and ten times as many; prints both."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = write_rows(folder / "small", 40)
        results = []
        for size in (rows, 10 * rows):
            seconds, peak = measure(small, write_rows(folder / f"rows{size}", size))
            results.append((seconds / size, peak))
            print(f"{size} rows: {seconds:.1f} s, {peak / 2**30:.2f} GiB", flush=True)
    (per_row, peak), (per_row_10x, peak_10x) = results
    return Growth(per_row_10x / per_row, peak_10x / peak)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000, help="of the smaller run; the larger one has ten times these")
    growth = compare(parser.parse_args().rows)
    print(f"10x the rows: {growth.time_per_row:.2f}x the time per row, {growth.peak_memory:.2f}x the peak memory")


if __name__ == "__main__":
    main()
