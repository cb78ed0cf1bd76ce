"""Ten times the rows: time per row and peak memory of preparation (validated rows and the token table).

    python -m benchmarks.prepare_rows [--rows 4000]

LLaVA JSON whose rows name four times fewer small JPEGs, as MiniMind-V's do; each size runs in a process of its own with
a cluster of its own, whose start is measured by a run of a hundredth of the rows and subtracted.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure_command import PeakMemory

ROWS_PER_PICTURE = 4
WORDS = [
    "red",
    "blue",
    "green",
    "small",
    "large",
    "dog",
    "cat",
    "house",
    "tree",
    "stands",
    "under",
    "near",
    "old",
    "street",
]


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
        caption = " ".join(random.choice(WORDS, random.integers(8, 25)))
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": f"{caption} {index}"}]
        rows.append({"id": str(index), "image": picture, "conversations": turns})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def prepare(path: Path, home: Path) -> None:
    """What `jobs.prepare` does with rows: validate them, train the tokenizer, write the token table."""
    from minivlm.config import load_config
    from minivlm.data.pipeline import build_tokens, prepare_samples
    from minivlm.workflow.cluster import connect, disconnect

    source = json.dumps([{"path": str(path), "split": "train"}])
    sources = [f"data.pretrain={source}", f"data.sft={source}"]
    config = load_config(Path("configs/tiny.yaml"), [f"storage_path={home}", "tokenizer.vocab_size=600", *sources])
    connect(config)
    try:
        prepare_samples(config)
        build_tokens(config, "pretrain", "train")
    finally:
        disconnect()


def measure(path: Path, home: Path) -> tuple[float, int]:
    """Seconds and peak bytes (PSS of all processes) of one preparation."""
    started = time.monotonic()
    process = multiprocessing.get_context("spawn").Process(target=prepare, args=(path, home))
    with PeakMemory(interval_s=2.0) as memory:
        process.start()
        process.join()
    if process.exitcode:
        raise RuntimeError(f"preparation of {path} ended with exit code {process.exitcode}")
    return time.monotonic() - started, memory.peak_bytes


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000, help="of the smaller run; the larger one has ten times these")
    rows = parser.parse_args().rows
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = (max(1, rows // 100), rows, 10 * rows)
        results = {}
        for size in sizes:
            path = write_rows(folder / f"rows{size}", size)
            results[size] = measure(path, folder / f"home{size}")
            print(f"{size} rows: {results[size][0]:.1f} s, {results[size][1] / 2**30:.2f} GiB", flush=True)
    start = results[sizes[0]][0]
    per_row = [(results[size][0] - start) / (size - sizes[0]) * 1e3 for size in sizes[1:]]
    print(f"per row after the start: {per_row[0]:.2f} ms and {per_row[1]:.2f} ms: {per_row[1] / per_row[0]:.2f}x")
    print(f"peak memory: {results[sizes[2]][1] / results[sizes[1]][1]:.2f}x")


if __name__ == "__main__":
    main()
