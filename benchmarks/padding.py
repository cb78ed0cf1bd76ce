"""Share of padding that training computes, on captions and on a long-tailed distribution.

    python -m benchmarks.padding

Models that attend sample by sample compute a micro-batch as one line of tokens, and attention itself (but not the
products around it) on samples padded to a multiple of 32. For others ("in rows") the plan packs samples into rows.
Beside them what batches of equally many samples, padded to their longest, would compute (drawn at
random, as a plain DataLoader does), and the plan's time per sample.
"""

import time
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.workload import caption_lengths, long_tailed_lengths, total_lengths
from minivlm.data.plan import PlannedStep, padded_length, plan_epoch
from minivlm.model.segments import group_width, line_length

NUM_SAMPLES, SEED = 20_000, 0


def padding_share(steps: list[PlannedStep], lengths: np.ndarray) -> float:
    """Computed tokens that are padding, as a share of all computed tokens: every micro-batch is one line."""
    computed = 0
    for step in steps:
        for rows in step.micro_batches:
            computed += line_length(sum(int(lengths[entry]) for row in rows for entry in row))
    return 1 - int(lengths.sum()) / computed


def share_in_attention(lengths: np.ndarray) -> float:
    """The same in attention alone, by sample: padded tokens, whose scores grow with the square."""
    return 1 - int(lengths.sum()) / int(group_width(torch.from_numpy(lengths)).sum())


def share_in_rows(steps: list[PlannedStep], lengths: np.ndarray) -> float:
    """The same where every row of a micro-batch is as long as its longest."""
    computed = 0
    for step in steps:
        for rows in step.micro_batches:
            computed += max(1, len(rows)) * padded_length(rows, lengths)
    return 1 - int(lengths.sum()) / computed


def plain_share(lengths: np.ndarray, batch_size: int) -> float:
    """The same for batches of `batch_size` samples in random order, each padded to its longest."""
    order = np.random.default_rng(SEED).permutation(len(lengths))
    batches = [lengths[order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    return 1 - int(lengths.sum()) / sum(len(batch) * int(batch.max()) for batch in batches)


def cases() -> Iterator[tuple[str, np.ndarray, int, list[PlannedStep], float]]:
    """Name, lengths, batch size, plan and its microseconds per sample, for each distribution and three layouts."""
    distributions = [
        ("captions of 11 to 34", total_lengths(caption_lengths(NUM_SAMPLES, SEED)), 2048),
        ("long tail to 1,900", total_lengths(long_tailed_lengths(NUM_SAMPLES, SEED)), 4096),
    ]
    for name, lengths, micro_batch_tokens in distributions:
        for batch_size, world_size in ((16, 1), (64, 2), (256, 8)):
            started = time.perf_counter()
            steps = plan_epoch(
                lengths,
                seed=SEED,
                epoch=0,
                global_batch_size=batch_size,
                world_size=world_size,
                micro_batch_tokens=micro_batch_tokens,
                pack_length=128,
            )
            micros = (time.perf_counter() - started) / len(lengths) * 1e6
            label = f"{name}, batch {batch_size}, {world_size} workers, {micro_batch_tokens} tokens"
            yield label, lengths, batch_size, steps, micros


def main() -> None:
    """Print one row per distribution and layout."""
    print("lengths | padding | attention | in rows | plain batches | plan, us per sample")
    for name, lengths, batch_size, steps, micros in cases():
        in_attention, plain = share_in_attention(lengths), plain_share(lengths, batch_size)
        shares = (padding_share(steps, lengths), in_attention, share_in_rows(steps, lengths), plain)
        print(f"{name} | " + " | ".join(f"{share:.1%}" for share in shares) + f" | {micros:.0f}")


if __name__ == "__main__":
    main()
