"""The same steps through Ray Data, Ray Train and DeepSpeed as in a plain torch loop: samples/s, ratio, waiting, memory.

    python -m benchmarks.train_ray [--precision bfloat16] [--compile] [--lanes 1 --zero-stage 2] [--batch 64]

One worker with two threads, MiniMind-V v1's small model, captions of 11 to 34 tokens with cached features, batch 16.
The plain loop (`benchmarks.train_step`) runs before and after, in processes of its own, on the same plan.
"""

import argparse
import multiprocessing
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.machine import describe, measure_limits
from benchmarks.measure_command import PeakMemory, peak_resident_bytes
from benchmarks.train_step import Speed, Trainer, build_model, measure_steps, planned_batches, step_flops
from benchmarks.workload import (
    IMAGE_TOKEN_ID,
    IMAGE_TOKENS,
    PAD_TOKEN_ID,
    VISION_SIZE,
    VOCAB_SIZE,
    write_features,
    write_table,
)
from minivlm.config import Config, load_config
from minivlm.data.features import FeatureCache
from minivlm.data.tokenizer import train_tokenizer
from minivlm.data.tokens import TokenTable
from minivlm.model.clip import build_clip, save_clip
from minivlm.train.job import StageJob, plan_training
from minivlm.train.launch import train_on_cluster
from minivlm.train.metrics import METRICS_FILE, read_metrics
from minivlm.workflow.cluster import connect, disconnect

PRESET = Path("configs/minimind-v-v1-small.yaml")
WARMUP = 8
"""Steps before the clock starts; the first ones compile."""


@dataclass(frozen=True)
class Comparison:
    """The same steps through Ray and DeepSpeed, and in a plain loop before and after."""

    ray: Speed
    plain: tuple[Speed, Speed]
    one_lane: Speed
    """The plain loop with all threads within each operation."""

    waited_s: float
    """Of the time in `ray`: spent waiting for batches."""

    memory_bytes: int
    """Peak of the worker, pages that it shares with others in full."""

    @property
    def ratio(self) -> float:
        """Median over the steps of Ray's time over the mean of the plain ones."""
        times = zip(self.ray.step_seconds, *(speed.step_seconds for speed in self.plain), strict=True)
        return statistics.median(ray_s / ((first + second) / 2) for ray_s, first, second in times)

    @property
    def waiting(self) -> float:
        """Share of the time."""
        return self.waited_s / sum(self.ray.step_seconds)


def main() -> None:
    """Measure and print."""
    arguments = parse()
    limits = measure_limits(torch.device("cpu"), threads=arguments.threads)
    print(describe(limits, torch.device("cpu")), flush=True)
    result = compare(arguments)
    runs = {"plain": result.plain[0], "Ray": result.ray, "plain again": result.plain[1]}
    for label, speed in {**runs, "plain, one micro-batch at a time": result.one_lane}.items():
        print(f"{label}: {speed.describe(limits, arguments.precision)}")
    name = f"Ray (ZeRO-{arguments.zero_stage})"
    print(f"{name} over plain, median of the same steps: {result.ratio:.3f}; waiting for data: {result.waiting:.2%}")
    print(f"peak memory of the worker: {result.memory_bytes / 2**30:.2f} GiB resident")


def compare(arguments: argparse.Namespace) -> Comparison:
    """Run all three; minutes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = write_table(folder / "table", arguments.samples, seed=0)
        features = write_features(folder / "features", arguments.samples, seed=0)
        before = measure_plain(folder, arguments, arguments.lanes)
        speed, waited, memory = measure_ray(make_job(folder, table, features, arguments), table)
        after = measure_plain(folder, arguments, arguments.lanes)
        one_lane = measure_plain(folder, arguments, 1) if arguments.lanes > 1 else after
        return Comparison(speed, (before, after), one_lane, waited, memory)


def measure_plain(folder: Path, arguments: argparse.Namespace, lanes: int) -> Speed:
    """The plain loop in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_plain, (folder, arguments, lanes))


def _plain(folder: Path, arguments: argparse.Namespace, lanes: int) -> Speed:
    torch.set_num_threads(arguments.threads)
    table, features = TokenTable.open(folder / "table"), FeatureCache.open(folder / "features" / "random")
    planned = planned_batches(table, features, arguments.batch, arguments.micro_batch_tokens, lanes)
    model, device = build_model("small"), torch.device("cpu")
    trainer = Trainer(model, arguments.precision, device, compiles=arguments.compile, num_lanes=lanes)
    return measure_steps(trainer, planned, warmup=WARMUP, steps=arguments.steps)


def measure_ray(job: StageJob, table: TokenTable, *, trainers_first: bool = True) -> tuple[Speed, float, int]:
    """The speed, seconds of waiting for batches in the same steps, and the worker's peak memory in bytes.

    Args:
        trainers_first: as for `connect`.
    """
    connect(job.config, trainers_first=trainers_first)
    try:
        with PeakMemory("RayTrainWorker", of=peak_resident_bytes) as memory:
            train_on_cluster(job, 0)
    finally:
        disconnect()
    lines = read_metrics(job.run_dir / METRICS_FILE)[WARMUP:]
    steps = plan_training(job)[WARMUP:]
    lengths = [[int(table.lengths[unit]) for unit in step.units] for step in steps]
    seconds = [sum(part) / line["tokens_per_s"] for part, line in zip(lengths, lines, strict=True)]
    model = build_model("small")
    speed = Speed(seconds, lengths, [step_flops(model, part) for part in lengths])
    return speed, sum(line["data_wait_s"] for line in lines), memory.peak_bytes


def make_job(folder: Path, table: TokenTable, features: FeatureCache, arguments: argparse.Namespace) -> StageJob:
    """A pretrain stage on the written table; tower and tokenizer are only carried into its export."""
    train_tokenizer(["a photo of a cat"], 300, folder / "tokenizer")
    tower = build_clip(
        image_size=224, patch_size=32, vision_hidden_size=VISION_SIZE, vision_layers=1, vision_heads=12,
        text_hidden_size=16, text_layers=1, text_heads=1, max_text_tokens=16, projection_dim=16, vocab_size=300,
        bos_token_id=1, eos_token_id=0, pad_token_id=0, seed=0,
    )  # fmt: skip
    save_clip(tower, folder / "tower")
    return StageJob(
        config=_config(folder, arguments),
        stage="pretrain",
        run_dir=folder / "runs" / "pretrain",
        train_table=table.directory,
        val_table=None,
        sample_table=None,
        features_dir=features.directory,
        encoding=None,
        num_features=IMAGE_TOKENS,
        vision_size=VISION_SIZE,
        tokenizer_path=str(folder / "tokenizer"),
        tower_path=str(folder / "tower"),
        image_token_id=IMAGE_TOKEN_ID,
        pad_token_id=PAD_TOKEN_ID,
        vocab_size=VOCAB_SIZE,
        initial_export=None,
        total_steps=WARMUP + arguments.steps,
    )


def _config(folder: Path, arguments: argparse.Namespace) -> Config:
    return load_config(
        PRESET,
        [
            f"storage_path={folder}",
            "train.num_workers=1",
            "train.cpus_per_worker=1",
            f"train.threads_per_worker={arguments.threads}",
            f"train.parallel_micro_batches={arguments.lanes}",
            f"train.zero_stage={arguments.zero_stage}",
            f"train.precision={arguments.precision}",
            f"train.compile={arguments.compile}",
            f"train.micro_batch_tokens={arguments.micro_batch_tokens}",
            f"train.pretrain.global_batch_size={arguments.batch}",
            "train.pretrain.epochs=1000",
            f"train.pretrain.max_steps={WARMUP + arguments.steps}",
        ],
    )


def parse(command_line: list[str] | None = None) -> argparse.Namespace:
    """Arguments, by default those of this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="both as train.compile")
    parser.add_argument("--lanes", type=int, default=2, help="both as train.parallel_micro_batches")
    parser.add_argument("--zero-stage", type=int, default=0, help="by default none: one worker has nothing to shard")
    parser.add_argument("--batch", type=int, default=16, help="samples per optimizer step")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=512, help="distinct captions and pictures")
    parser.add_argument("--steps", type=int, default=20, help="measured steps, after eight others")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(command_line)


if __name__ == "__main__":
    main()
