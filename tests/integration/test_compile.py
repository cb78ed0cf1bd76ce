"""Layers compiled by g++ in a stage of seconds: no cluster, but half a minute of compiling."""

import json
import math
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from minivlm.data.tokens import TokenTable
from minivlm.model import fast_layers
from minivlm.model.checkpoint import MANIFEST
from minivlm.model.fast_layers import _release_lock_in_kernels
from minivlm.model.vlm import MiniVLM
from minivlm.train import masters
from minivlm.train.job import plan_training
from tests.float32_copies import check_float32_copies
from tests.tiny_stage import interrupted, run, stage_job, tiny_parts

__all__ = ["tiny_parts"]
pytestmark = pytest.mark.usefixtures("one_rank")


def exported(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "export" / "model.safetensors")


SIDE_BY_SIDE = {"zero_stage": 0, "threads_per_worker": 2, "parallel_micro_batches": 2}


@pytest.mark.parametrize(
    ("precision", "tolerance", "layout"), [("float32", 1e-5, {}), ("bfloat16", 2e-2, SIDE_BY_SIDE)]
)
def test_compiled_layers_train_alike_and_resume_to_the_bit(
    tiny_parts: Path, tmp_path: Path, precision: str, tolerance: float, layout: dict[str, int]
):
    torch.compiler.reset()
    settings: dict[str, Any] = {"micro_batch_tokens": 40, "checkpoint_every_steps": 1, "precision": precision, **layout}
    plain = exported(run(stage_job(tiny_parts, tmp_path / "plain", **settings))[1])
    job = stage_job(tiny_parts, tmp_path / "compiled", compile=True, **settings)
    checkpoint = run(job)[1]
    compiled = exported(checkpoint)
    assert json.loads((checkpoint / MANIFEST).read_text())["reload_difference"] <= tolerance
    assert_close(compiled, plain, rtol=0, atol=10 * tolerance)
    torch.compiler.reset()  # as in a new process, which compiles for the rows of the second step first
    again = stage_job(tiny_parts, tmp_path / "again", compile=True, **settings)
    interrupted(again, after=1)
    assert_close(exported(run(again)[1]), compiled, rtol=0, atol=0)


def test_a_run_with_longer_samples_resumes_to_the_bit_too(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Their attention is not compiled and cuts a layer in two; what a process meets and compiles first must not matter.

    A decoder compiled in one piece does not pass: what inductor fuses, and so rounds, depends on the first lengths.
    """
    monkeypatch.setattr(fast_layers, "LONGEST_PRODUCT", 32)
    parts = tmp_path / "parts"
    shutil.copytree(tiny_parts, parts)
    settings: dict[str, Any] = {"checkpoint_every_steps": 1, "precision": "bfloat16", "compile": True, **SIDE_BY_SIDE}
    job = stage_job(parts, tmp_path / "whole", **settings)
    table = TokenTable.open(parts / "table")
    samples = [table[index] for index in range(len(table))]
    second = plan_training(job)[1].units[0]
    tail = np.arange(10, 60, dtype=np.int32)
    samples[second] = replace(
        samples[second],
        input_ids=np.concatenate([samples[second].input_ids, tail]),
        labels=np.concatenate([samples[second].labels, tail]),
    )
    shutil.rmtree(parts / "table")
    TokenTable.write(parts / "table", samples)
    attends_by_products: list[bool] = []
    layouts_of = MiniVLM._layouts

    def layouts(vlm: MiniVLM, segment_ids: torch.Tensor) -> Any:
        found = layouts_of(vlm, segment_ids)
        if vlm.training:
            attends_by_products.append(found[1] is None)
        return found

    monkeypatch.setattr(MiniVLM, "_layouts", layouts)
    torch.compiler.reset()
    whole = exported(run(job)[1])
    assert sorted(attends_by_products) == [False] + [True] * 5
    torch.compiler.reset()
    again = stage_job(parts, tmp_path / "again", **settings)
    interrupted(again, after=1)
    torch.compiler.reset()
    assert_close(exported(run(again)[1]), whole, rtol=0, atol=0)


@pytest.mark.parametrize("clip_norm", [0.5, math.inf])
@pytest.mark.parametrize("piece", [1, 9, 10_000])
def test_a_compiled_update_is_that_of_torch(clip_norm: float, piece: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(masters.CompiledAdamW, "piece_elements", piece)
    check_float32_copies(masters.CompiledAdamW, clip_norm)


def test_other_threads_run_beside_a_compiled_kernel():
    """It takes a second; with Python's lock held the other thread would not be scheduled once."""
    _release_lock_in_kernels()
    torch.compiler.reset()
    values = torch.linspace(0, 1, 16_000_000)

    @torch.compile
    def slow(x: torch.Tensor) -> torch.Tensor:
        for _ in range(100):
            x = torch.sin(x)
        return x

    slow(values)
    begun, ended = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        slow(values)
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    looks = 0
    while not ended.wait(0.02):
        looks += 1
    thread.join()
    assert looks >= 5
