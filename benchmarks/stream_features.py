"""One epoch with encoder actors beside the trainer against encoding everything first and then training on the cache.

    python -m benchmarks.stream_features --pictures 192 --hidden-size 256 --layers 4

Both runs are the real path on one local Ray cluster: Ray Data, Ray Train and DeepSpeed, from the same rows and the same
start (a one-step pretrain on pictures of their own, not timed). Timed is all that the user waits for: starts of actors
and workers, encoding, training, checkpoint. The tower is a CLIP ViT-B/32 at 224 px with random weights, the pictures
are noisy JPEGs, the captions 11 to 34 words. Weights and features of both runs are compared to the bit.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from minivlm import layout
from minivlm.config import Config, load_config
from minivlm.data.features import FeatureCache
from minivlm.data.pipeline import prepare_samples, prepare_tokenizer
from minivlm.data.shards import committed_digests
from minivlm.model.clip import build_clip, save_clip
from minivlm.train.launch import StageResult, run_stage
from minivlm.workflow.cluster import connect, disconnect
from minivlm.workflow.steps import prepare

WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "small",
    "large",
    "old",
    "new",
    "dog",
    "cat",
    "car",
    "tree",
    "house",
    "street",
    "near",
    "under",
    "over",
    "with",
    "and",
    "of",
    "the",
]
MATMUL_SIZE = 1024


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=192, help="pictures and rows of the timed epoch")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the language model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="of the language model")
    parser.add_argument("--precision", default="auto", help="of training: auto, float32 or bfloat16")
    parser.add_argument("--encode-precision", default="float32", help="of the tower: float32 or bfloat16")
    parser.add_argument("--encoders", type=int, default=1, help="encoder actors")
    parser.add_argument("--cpus", type=float, default=4.0, help="logical CPUs of the local cluster")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = write_inputs(folder, args)
        connect(load_config(path))
        try:
            report(path, folder, args)
        finally:
            disconnect()


def report(path: Path, folder: Path, args: argparse.Namespace) -> None:
    """Both runs, one after the other, and the table."""
    seconds, results, caches = {}, {}, {}
    for mode in ("cached", "stream"):
        config = load_config(path, [f"data.features={mode}", f"storage_path={folder / mode}"])
        begin(config, folder / "start")
        started = time.perf_counter()
        prepare(config)
        results[mode] = run_stage(config, "sft")
        seconds[mode] = time.perf_counter() - started
        caches[mode] = FeatureCache.open(next(layout.features_root(config).iterdir()))
    stat = caches["stream"].stat()
    digests = sorted(committed_digests(caches["stream"].directory))
    features = [caches[mode].get(digests).view(torch.int16) for mode in caches]
    print(f"{args.pictures} pictures, language model {args.hidden_size} x {args.layers}, {args.encoders} encoder(s)")
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        print(f"matmul {MATMUL_SIZE}^3, {name:<10}{matmul_gflops(dtype):>10.0f} GFLOP/s")
    for mode, elapsed in seconds.items():
        print(f"{mode:<24}{elapsed:>10.1f} s")
    print(f"{'stream / cached':<24}{seconds['stream'] / seconds['cached']:>10.2f}")
    print(f"encoded / distinct      {stat.encoded:>10} / {stat.distinct}")
    print(f"features equal to the bit: {torch.equal(*features)}, weights: {same_weights(results)}")


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


def write_inputs(folder: Path, args: argparse.Namespace) -> Path:
    """Pictures, rows, tower and settings; returns the settings' path."""
    draw = random.Random(0)
    rows: dict[str, list[dict[str, object]]] = {"pretrain": [], "sft": []}
    for number in range(args.pictures + 8):
        noise = np.random.default_rng(number).integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(folder / f"{number}.jpg", quality=85)
        caption = " ".join(draw.choices(WORDS, k=draw.randint(11, 34)))
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": caption}]
        stage = "pretrain" if number < 8 else "sft"
        rows[stage].append({"image": f"{number}.jpg", "conversations": turns})
    for stage, values in rows.items():
        (folder / f"{stage}.json").write_text(json.dumps(values))
    clip = build_clip(
        image_size=224, patch_size=32, vision_hidden_size=768, vision_layers=12, vision_heads=12, text_hidden_size=64,
        text_layers=1, text_heads=1, max_text_tokens=16, projection_dim=64, vocab_size=300, bos_token_id=1,
        eos_token_id=0, pad_token_id=0, seed=0,
    )  # fmt: skip
    save_clip(clip, folder / "clip")
    heads = args.hidden_size // 64
    tree = {
        "cluster": {"num_cpus": args.cpus},
        "data": {
            stage: [{"path": str(folder / f"{stage}.json"), "image_root": str(folder), "split": "train"}]
            for stage in rows
        },
        "tokenizer": {"vocab_size": 1024},
        "clip": {
            "path": str(folder / "clip"), "image_size_px": 224, "patch_size_px": 32, "vision_hidden_size": 768,
            "encode_batch_size": 16, "encode_precision": args.encode_precision, "num_encoders": args.encoders,
        },
        "model": {
            "language_model": {
                "hidden_size": args.hidden_size, "num_hidden_layers": args.layers, "num_attention_heads": heads,
                "num_key_value_heads": heads, "intermediate_size": 4 * args.hidden_size,
            }
        },
        "train": {
            "num_workers": 1, "threads_per_worker": 2, "precision": args.precision, "checkpoint_every_steps": 10**6,
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


def matmul_gflops(dtype: torch.dtype) -> float:
    """A product of two square matrices, best of three, 10^9 operations per second."""
    matrix = torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(dtype)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        torch.matmul(matrix, matrix)
        times.append(time.perf_counter() - started)
    return 2 * MATMUL_SIZE**3 / min(times) / 1e9


if __name__ == "__main__":
    main()
