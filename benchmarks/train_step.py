"""The pure training step without Ray and DeepSpeed: samples/s, tokens/s and their share of what the device can do.

    python -m benchmarks.train_step --threads 2                                   # this CPU, float32
    python -m benchmarks.train_step --device cuda --precision bfloat16 --batch 256
    python -m benchmarks.train_step --profile                                     # where the time goes

MiniMind-V v1's shapes, everything but the tower trained, on `benchmarks.workload` captions with cached features, by the
product's own plan, collation, model and loss. bfloat16: weights in bfloat16 and a float32 master of them in AdamW.
Needs torch, transformers, numpy and safetensors.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import Limits, describe, measure_limits, synchronize
from benchmarks.workload import IMAGE_TOKEN_ID, PAD_TOKEN_ID, VISION_SIZE, VOCAB_SIZE, write_features, write_table
from minivlm.data.collate import Batch, collate
from minivlm.data.features import FeatureCache
from minivlm.data.plan import plan_epoch
from minivlm.data.tokens import TokenTable
from minivlm.model.fast_layers import compile_model, use_segment_attention
from minivlm.model.language import build_language_model
from minivlm.model.projector import build_projector
from minivlm.model.vlm import MiniVLM, cast_weights
from minivlm.train.lanes import Lanes
from minivlm.train.losses import MPOWeights, RewardShift
from minivlm.train.optimizer import decay_groups
from minivlm.train.stages import LossSettings, StepTotals, count_totals, token_loss

SIZES = {
    "small": {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408},
    "base": {"hidden_size": 768, "num_hidden_layers": 16, "intermediate_size": 2048},
}
LOSS = LossSettings(weights=MPOWeights())
Planned = Iterator[tuple[list[int], list[Batch]]]
"""Lengths of a step's samples, and its micro-batches."""

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_model(size: str) -> MiniVLM:
    """MiniMind-V v1 (27.27M or 109.34M parameters), random."""
    hidden = SIZES[size]["hidden_size"]
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": hidden // 16}
    fixed = {"tie_word_embeddings": True, "rope_theta": 10_000.0, "max_position_embeddings": 8192}
    sizes = {**SIZES[size], **heads, **fixed, "initializer_range": 0.02}
    language_model = build_language_model(path=None, architecture="llama", sizes=sizes, vocab_size=VOCAB_SIZE, seed=0)
    return MiniVLM(build_projector("linear", VISION_SIZE, hidden), language_model, IMAGE_TOKEN_ID)


def step_flops(model: MiniVLM, lengths: list[int]) -> float:
    """Floating-point operations of one step on samples of these lengths, padding and recomputation not counted.

    6 x parameters x tokens, without the embedding look-up (a tied head counts as the head), and causal attention
    within each sample: 6 x layers x width x tokens^2.
    """
    config = model.language_model.config
    untied = 0 if config.tie_word_embeddings else model.language_model.get_input_embeddings().weight.numel()
    parameters = sum(parameter.numel() for parameter in model.parameters()) - untied
    width = config.num_attention_heads * config.head_dim
    attention = sum(6 * config.num_hidden_layers * width * length**2 for length in lengths)
    return 6 * parameters * sum(lengths) + attention


class Trainer:
    """A plain torch loop: gradients of a step's micro-batches add up, then AdamW."""

    def __init__(
        self, model: MiniVLM, precision: str, device: torch.device, *, compiles: bool = False, num_lanes: int = 1
    ) -> None:
        self.device = device
        self.model = model.to(device).train()
        cast_weights(self.model, TYPES[precision])
        use_segment_attention(self.model)
        if compiles:
            compile_model(self.model, device)
        self.lanes = Lanes(self.model, num_lanes, is_compiled=compiles)
        self.weights = list(self.model.parameters())
        self.master = self.weights
        if precision == "bfloat16":
            self.master = [nn.Parameter(weight.detach().float()) for weight in self.weights]
        self.optimizer = torch.optim.AdamW(decay_groups(self.master, 0.05), lr=1e-4, betas=(0.9, 0.99), fused=True)

    def step(self, batches: list[Batch]) -> float:
        """One optimizer step; returns its loss."""
        totals = StepTotals(*sum(count_totals(batch) for batch in batches).tolist())
        shift = RewardShift()

        def differentiate(lane: int, batch: Batch) -> Tensor:
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            result = token_loss(self.lanes.modules[lane](batch), batch, totals, LOSS, shift)
            result.loss.backward()
            return result.metrics["loss"]

        losses = self.lanes.run(differentiate, batches)
        self.lanes.add_gradients()
        if self.master is not self.weights:
            for master, weight in zip(self.master, self.weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(self.master, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.master is not self.weights:
            torch._foreach_copy_([weight.detach() for weight in self.weights], [p.detach() for p in self.master])
        return float(torch.stack(losses).sum())


def planned_batches(
    table: TokenTable, features: FeatureCache, batch_size: int, micro_batch_tokens: int, num_lanes: int
) -> Planned:
    """The product's plan with one worker, epoch after epoch."""
    ids = {"image_token_id": IMAGE_TOKEN_ID, "pad_token_id": PAD_TOKEN_ID}
    plan = {"seed": 0, "world_size": num_lanes, "pack_length": 128, "micro_batch_tokens": micro_batch_tokens}
    for epoch in itertools.count():
        for step in plan_epoch(table.lengths, epoch=epoch, global_batch_size=batch_size, **plan):
            batches = [collate(table, rows, features.get, **ids) for rows in step.micro_batches]
            yield [int(table.lengths[unit]) for unit in step.units], batches


@dataclass(frozen=True)
class Speed:
    """What was measured over the steps after the warm-up."""

    step_seconds: list[float]
    """Wall time of each step."""

    step_lengths: list[list[int]]
    """Tokens of each step's samples, one picture each."""

    step_flops: list[float]
    """Needed operations of each step (`step_flops`)."""

    @property
    def samples_per_s(self) -> float:
        """Over all steps."""
        return sum(map(len, self.step_lengths)) / sum(self.step_seconds)

    @property
    def tokens_per_s(self) -> float:
        """Over all steps, padding not counted."""
        return sum(map(sum, self.step_lengths)) / sum(self.step_seconds)

    def matmul_share(self, limits: Limits, precision: str) -> str:
        """Needed operations per second, and their share of the machine's matrix product."""
        rate = sum(self.step_flops) / sum(self.step_seconds) / 1e9
        return f"{rate:.4g} GFLOP/s = {rate / limits.matmul_gflops[precision]:.0%} of the {precision} product"

    def describe(self, limits: Limits, precision: str) -> str:
        """One line."""
        return (
            f"{self.samples_per_s:.1f} samples/s, {self.tokens_per_s:.0f} tokens/s, "
            f"{statistics.median(self.step_seconds) * 1e3:.0f} ms a step, {self.matmul_share(limits, precision)}"
        )


def measure_steps(trainer: Trainer, planned: Planned, *, warmup: int, steps: int) -> Speed:
    """Time each of `steps` steps after `warmup` others; batches are made before the clock starts."""
    model, device = trainer.model, trainer.device
    for _ in range(warmup):
        trainer.step(next(planned)[1])
    seconds, lengths = [], []
    for step_lengths, batches in itertools.islice(planned, steps):
        synchronize(device)
        started = time.perf_counter()
        trainer.step(batches)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        lengths.append(step_lengths)
    return Speed(seconds, lengths, [step_flops(model, step_lengths) for step_lengths in lengths])


def main() -> None:
    """Measure and print."""
    arguments = _parse()
    device = torch.device(arguments.device)
    limits = measure_limits(device, threads=arguments.threads)
    print(describe(limits, device))
    with tempfile.TemporaryDirectory() as folder:
        table = write_table(Path(folder) / "table", arguments.samples, seed=0)
        features = write_features(Path(folder) / "features", arguments.samples, seed=0)
        lanes = arguments.lanes
        planned = planned_batches(table, features, arguments.batch, arguments.micro_batch_tokens, lanes)
        model = build_model(arguments.model)
        trainer = Trainer(model, arguments.precision, device, compiles=arguments.compile, num_lanes=lanes)
        speed = measure_steps(trainer, planned, warmup=arguments.warmup, steps=arguments.steps)
        name = f"{arguments.model}, {arguments.precision}, batch {arguments.batch}"
        print(f"{name}: {speed.describe(limits, arguments.precision)}")
        if arguments.profile:
            with torch.profiler.profile() as profile:
                for _, batches in itertools.islice(planned, 3):
                    trainer.step(batches)
            key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
            print(profile.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=40))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=tuple(TYPES), default="float32")
    parser.add_argument("--model", choices=tuple(SIZES), default="small")
    parser.add_argument("--batch", type=int, default=16, help="samples per optimizer step")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=512, help="distinct captions and pictures")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, help="torch threads (CPU)")
    parser.add_argument("--compile", action="store_true", help="as train.compile")
    parser.add_argument("--lanes", type=int, default=1, help="as train.parallel_micro_batches (CPU)")
    parser.add_argument("--profile", action="store_true", help="then print where three steps spend their time")
    return parser.parse_args()


if __name__ == "__main__":
    main()
