"""Every speed figure in one table, beside what is asked and the machine's limits measured in the same run.

    make bench                      # two cores: 10 minutes with bfloat16 units, 15 to 30 without; run nothing else
    python -m benchmarks.table --steps 6 --rows 500 --pictures 64        # a rough look

bfloat16 is used where this CPU has instructions for it, else float32 stands in and the table says so.
"""

import argparse
from collections.abc import Iterator

import torch

from benchmarks import clip_actors, padding, prepare_rows, stream_features, train_ray
from benchmarks.machine import Limits, describe, measure_limits
from minivlm.config.base import cpu_has_bfloat16

Row = tuple[str, str, str]
"""Figure, asked, measured."""


def training(precision: str, steps: int, limits: Limits, *options: str) -> Iterator[Row]:
    """One worker with two threads through Ray Data, Ray Train and DeepSpeed."""
    arguments = train_ray.parse([f"--precision={precision}", f"--steps={steps}", *options])
    result = train_ray.compare(arguments)
    asked = {"bfloat16": ">= 50 samples/s", "float32": ">= 13 samples/s"}[precision]
    name = " ".join((precision, f"ZeRO-{arguments.zero_stage}", f"--lanes={arguments.lanes}", *options))
    plain = "; plain loop {:.1f} and {:.1f}, with one lane {:.1f}".format(
        *(speed.samples_per_s for speed in (*result.plain, result.one_lane))
    )
    yield f"training, {name}, through Ray and DeepSpeed", asked, f"{result.ray.samples_per_s:.1f} samples/s{plain}"
    yield f"model FLOP/s, {name}", ">= 35 % (bfloat16)", result.ray.matmul_share(limits, precision)
    yield f"Ray and DeepSpeed over the plain loop, {name}", "<= 1.10", f"{result.ratio:.3f}"
    yield f"trainer waiting for data, {name}", "<= 2 %", f"{result.waiting:.2%}"
    yield f"memory of the worker, {name}", "<= 2.5 GiB", f"{result.memory_bytes / 2**30:.2f} GiB"


def rows(arguments: argparse.Namespace, limits: Limits, precision: str) -> Iterator[Row]:
    """The table, figure by figure."""
    for kind in dict.fromkeys((precision, "float32")):
        yield from training(kind, arguments.steps, limits)
    if precision == "bfloat16":
        yield from training(precision, arguments.steps, limits, "--compile")
    rates = clip_actors.measure(clip_actors.parse([f"--precision={precision}", f"--pictures={arguments.pictures}"]))
    yield "CLIP ViT-B/32 actors, JPEG decoding included", ">= 70 pictures/s", rates.describe(limits, precision)
    streaming = stream_features.compare(stream_features.parse([f"--precision={precision}"]))
    yield "first epoch: streaming over cache-then-train", "<= 1.0", streaming.describe()
    growth = prepare_rows.compare(arguments.rows)
    yield "10x the rows: preparation time per row", "<= 1.15x", f"{growth.time_per_row:.2f}x"
    yield "10x the rows: peak memory", "<= 1.1x", f"{growth.peak_memory:.2f}x"
    for name, lengths, _, steps, _ in padding.cases():
        share, in_rows = padding.padding_share(steps, lengths), padding.share_in_rows(steps, lengths)
        others = f"(in attention {padding.share_in_attention(lengths):.1%}; in rows {in_rows:.1%})"
        yield f"padding, {name}", "<= 5 %", f"{share:.1%} {others}"


def main() -> None:
    """Measure everything; each figure is printed when it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="measured training steps of batch 16")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=4000)
    arguments = parser.parse_args()
    limits = measure_limits(torch.device("cpu"), threads=2)
    precision = "bfloat16" if cpu_has_bfloat16() else "float32"
    print(describe(limits, torch.device("cpu")))
    if precision == "float32":
        print("This CPU has no bfloat16 instructions: float32 stands in for it.")
    print("| figure | asked | measured |\n|---|---|---|", flush=True)
    for row in rows(arguments, limits, precision):
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
