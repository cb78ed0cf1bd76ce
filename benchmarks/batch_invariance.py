"""Whether a trained model's greedy answers depend on the batch that they are decoded in, and what it costs that not.

    python -m benchmarks.batch_invariance --export RUN/checkpoints/STEP/export --samples DATASETS/samples-H \\
        --features FEATURES/FINGERPRINT --questions 512

For float32 and bfloat16: the largest change of a first token's logits between a batch and each prompt alone, as a share
of the row's largest logit; answers that differ between batch sizes, with nearly equal tokens decided by a forward of
that prompt alone (`settled`) and without (`plain`); how many tokens were so decided; the time of both.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minivlm.data.chat import encode_prompt
from minivlm.data.features import FeatureCache
from minivlm.data.samples import load_samples
from minivlm.evaluation.tasks import select_questions
from minivlm.model import choose, generate
from minivlm.model.export import Export, load_export

BATCH_SIZES = (256, 64, 7)
MAX_NEW_TOKENS = 100


def read_prompts(export: Export, samples: Path, features: Path, count: int) -> list[generate.Prompt]:
    """Test questions of every task, evenly, in evaluation's order: by length."""
    cache = FeatureCache.open(features)
    questions = select_questions(load_samples(samples, split="test"), max_per_task=None, seed=0)
    prompts = []
    for question in questions[:: max(1, len(questions) // count)][:count]:
        ids = encode_prompt(export.tokenizer, question.messages, export.num_image_tokens)
        prompts.append(generate.Prompt(ids, cache.get(question.image_sha256)))
    return sorted(prompts, key=lambda prompt: len(prompt.input_ids))


def answer(export: Export, prompts: Sequence[generate.Prompt], batch_size: int) -> tuple[list[list[int]], float]:
    """Greedy answers in batches of so many, and the seconds that it took."""
    started, answers = time.perf_counter(), []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        eos = int(export.tokenizer.eos_token_id)
        answers += generate.generate(export.vlm, part, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=eos)
    return answers, time.perf_counter() - started


@torch.no_grad()
def largest_change(export: Export, prompts: Sequence[generate.Prompt]) -> float:
    """Of the first token's logits, between the whole batch and each prompt alone, relative to the row's largest."""

    def first(part: Sequence[generate.Prompt]) -> torch.Tensor:
        return generate._prefill(export.vlm, part, 1, generate.Cache(layer_class_to_replicate=generate.RoomyLayer))[0]

    together, alone = first(prompts), torch.cat([first([prompt]) for prompt in prompts])
    return float(((together - alone).abs().amax(-1) / alone.abs().amax(-1)).max())


def main() -> None:
    """Print one line per type and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("export", "samples", "features"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    export = load_export(arguments.export)
    prompts = read_prompts(export, arguments.samples, arguments.features, arguments.questions)
    margin, settle, settled = choose.MARGIN, generate._settle, [0]

    def counted(*given: Any) -> int:
        settled[0] += 1
        return settle(*given)

    generate._settle = counted  # type: ignore[assignment]
    for dtype in (torch.float32, torch.bfloat16):
        export.vlm.to(dtype)
        print(
            f"{dtype}: logits change by up to {largest_change(export, prompts):.1e} of the largest, margin {margin:g}"
        )
        expected: dict[float, list[list[int]]] = {}
        for size in BATCH_SIZES:
            cells = []
            for name, used in (("plain", 0.0), ("settled", margin)):
                choose.MARGIN, settled[0] = used, 0
                answers, seconds = answer(export, prompts, size)
                tokens = sum(map(len, answers))
                other = sum(a != b for a, b in zip(answers, expected.setdefault(used, answers), strict=True))
                cells.append(
                    f"{name}: {other} answers differ, {settled[0]} of {tokens} tokens settled, {seconds:.1f} s"
                )
            print(f"  batch {size:>4}  {'; '.join(cells)}", flush=True)
        moved = sum(a != b for a, b in zip(expected[0.0], expected[margin], strict=True))
        print(f"  of {len(prompts)} plain answers at batch {BATCH_SIZES[0]}, {moved} are others when settled")


if __name__ == "__main__":
    main()
