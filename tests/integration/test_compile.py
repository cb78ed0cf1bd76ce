"""Layers compiled by g++ in a stage of seconds: no cluster, but half a minute of compiling."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from minivlm.model.checkpoint import MANIFEST
from tests.tiny_stage import interrupted, run, stage_job, tiny_parts

__all__ = ["tiny_parts"]
pytestmark = pytest.mark.usefixtures("one_rank")


def exported(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "export" / "model.safetensors")


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_compiled_layers_train_alike_and_resume_to_the_bit(
    tiny_parts: Path, tmp_path: Path, precision: str, tolerance: float
):
    torch.compiler.reset()
    settings: dict[str, Any] = {"micro_batch_tokens": 40, "checkpoint_every_steps": 1, "precision": precision}
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
