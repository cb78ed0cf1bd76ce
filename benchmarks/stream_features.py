"""One epoch with encoder actors beside the trainer against encoding everything first and then training on the cache.

    python -m benchmarks.stream_features --pictures 192 --hidden-size 256 --layers 4

Both runs are the real path on one local Ray cluster: Ray Data, Ray Train and DeepSpeed, from the same rows and the same
start (a one-step pretrain on pictures of their own, not timed). Timed is all that the user waits for: starts of actors
and workers, encoding, training, checkpoint. The tower is a CLIP ViT-B/32 at 224 px with random weights, the captions
have 11 to 34 words. Weights and features of both runs are compared to the bit.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.clip_actors import write_pictures, write_tower
from benchmarks.machine import describe, measure_limits
from benchmarks.prepare_rows import WORDS
from minivlm import layout
from minivlm.config import Config, load_config
from minivlm.data.features import FeatureCache
from minivlm.data.pipeline import prepare_samples, prepare_tokenizer
from minivlm.data.shards import committed_digests
from minivlm.train.launch import StageResult, run_stage
from minivlm.workflow.cluster import connect, disconnect
from minivlm.workflow.steps import prepare

PRETRAIN_PICTURES = 8
MODES = ("cached", "stream")


@dataclass(frozen=True)
class Streaming:
    """Both runs."""

    seconds: dict[str, float]
    """By mode of `data.features`."""

    encoded: int
    distinct: int
    """Pictures of the cache that streaming filled."""

    is_equal: bool
    """Features and final weights of both runs, to the bit."""

    def describe(self) -> str:
        """One line."""
        times = ", ".join(f"{mode} {elapsed:.1f} s" for mode, elapsed in self.seconds.items())
        bits = "equal" if self.is_equal else "DIFFERENT"
        return f"{self.ratio:.2f} ({times}; encoded / distinct {self.encoded} / {self.distinct}; bits {bits})"

    @property
    def ratio(self) -> float:
        """Streaming over cache-then-train."""
        return self.seconds["stream"] / self.seconds["cached"]


def main() -> None:
    """Measure and print."""
    arguments = parse()
    print(describe(measure_limits(torch.device("cpu"), threads=2), torch.device("cpu")), flush=True)
    print(f"stream over cached: {compare(arguments).describe()}")


def compare(arguments: argparse.Namespace) -> Streaming:
    """Both runs, one after the other."""
    seconds: dict[str, float] = {}
    results: dict[str, StageResult] = {}
    caches: dict[str, FeatureCache] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = write_inputs(folder, arguments)
        connect(load_config(path), trainers_first=True)
        try:
            for mode in MODES:
                config = load_config(path, [f"data.features={mode}", f"storage_path={folder / mode}"])
                begin(config, folder / "start")
                started = time.perf_counter()
                prepare(config)
                results[mode] = run_stage(config, "sft")
                seconds[mode] = time.perf_counter() - started
                caches[mode] = FeatureCache.open(next(layout.features_root(config).iterdir()))
        finally:
            disconnect()
        stat = caches["stream"].stat()
        digests = sorted(committed_digests(caches["stream"].directory))
        features = [caches[mode].get(digests).view(torch.int16) for mode in MODES]
        return Streaming(seconds, stat.encoded, stat.distinct, torch.equal(*features) and same_weights(results))


def begin(config: Config, start: Path) -> None:
    """Rows, tokenizer and the finished pretrain that the timed stage starts from; made once, shared by a link."""
    config.root.mkdir()
    if not start.exists():
        start.mkdir()
        first = config.model_copy(update={"storage_path": start})
        prepare_samples(first)
        prepare_tokenizer(first)
        run_stage(first.model_copy(update={"data": config.data.model_copy(update={"features": "stream"})}), "pretrain")
    for name in ("datasets", "tokenizers"):
        (config.root / name).symlink_to(start / name)
    shutil.copytree(start / "features", config.root / "features")  # of the pretrain's pictures
    (config.root / "runs").mkdir()
    for run in (start / "runs").iterdir():
        (config.root / "runs" / run.name).symlink_to(run)


def write_inputs(folder: Path, arguments: argparse.Namespace) -> Path:
    """Pictures, rows, tower and settings; returns the settings' path."""
    draw, words = random.Random(0), WORDS.split()
    rows: dict[str, list[dict[str, object]]] = {"pretrain": [], "sft": []}
    paths = write_pictures(folder / "pictures", arguments.pictures + PRETRAIN_PICTURES)
    for number, path in enumerate(paths):
        caption = " ".join(draw.choices(words, k=draw.randint(11, 34)))
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": caption}]
        stage = "pretrain" if number < PRETRAIN_PICTURES else "sft"
        rows[stage].append({"image": path.name, "conversations": turns})
    for stage, values in rows.items():
        (folder / f"{stage}.json").write_text(json.dumps(values))
    write_tower(folder / "clip")
    heads = arguments.hidden_size // 64
    tree = {
        "cluster": {"num_cpus": arguments.cpus},
        "data": {
            stage: [{"path": str(folder / f"{stage}.json"), "image_root": str(folder / "pictures"), "split": "train"}]
            for stage in rows
        },
        "tokenizer": {"vocab_size": 1024},
        "clip": {
            "path": str(folder / "clip"), "image_size_px": 224, "patch_size_px": 32, "vision_hidden_size": 768,
            "encode_batch_size": 16, "encode_precision": arguments.precision, "num_encoders": 1,
        },
        "model": {
            "language_model": {
                "hidden_size": arguments.hidden_size, "num_hidden_layers": arguments.layers,
                "num_attention_heads": heads, "num_key_value_heads": heads,
                "intermediate_size": 4 * arguments.hidden_size,
            }
        },
        "train": {
            "num_workers": 1, "threads_per_worker": 2, "zero_stage": 0, "parallel_micro_batches": 2,
            "precision": arguments.precision,
            "checkpoint_every_steps": 10**6,
            "pretrain": {"global_batch_size": 8, "max_steps": 1}, "sft": {"global_batch_size": 16},
        },
    }  # fmt: skip
    path = folder / "settings.yaml"
    path.write_text(json.dumps(tree))
    return path


def same_weights(results: dict[str, StageResult]) -> bool:
    """Whether both runs ended with the same bits."""
    first, second = (load_file(result.export_dir / "model.safetensors") for result in results.values())
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def parse(command_line: list[str] | None = None) -> argparse.Namespace:
    """Arguments, by default those of this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=192, help="pictures and rows of the timed epoch")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the language model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="of the language model")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--cpus", type=float, default=4.0, help="logical CPUs of the local cluster")
    return parser.parse_args(command_line)


if __name__ == "__main__":
    main()
