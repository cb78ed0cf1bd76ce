"""A real sweep with Ray Tune on a real cluster: tiny trials share one feature cache, the best is reproducible."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from PIL import Image
from safetensors.torch import load_file

from minivlm.config import Config, ConfigError, load_config
from minivlm.data.pipeline import prepare_features, prepare_samples, prepare_tokenizer
from minivlm.layout import run_dir
from minivlm.model.clip import build_clip, save_clip
from minivlm.train.launch import StageResult, run_stage
from minivlm.tune.search import SearchResult, TrialRow, best_trial, search

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(590)]

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
SETTINGS = """
storage_path: HOME/store
data:
  max_bad_fraction: 0
  pretrain: [{path: HOME/train.json, split: train}, {path: HOME/val.json, split: val}]
  sft: [{path: HOME/train.json, split: train}]
clip: {path: HOME/clip, image_size_px: 16, patch_size_px: 8, encode_batch_size: 8}
tokenizer: {vocab_size: 300}
model:
  projector: mlp2x_gelu
  max_length_tokens: 64
  language_model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 1, num_key_value_heads: 1,
                   head_dim: 32, intermediate_size: 64}
train:
  micro_batch_tokens: 256
  pack_length_tokens: 64
  pretrain: {global_batch_size: 8, epochs: 3}
tune: {num_trials: 4, max_steps: 9, num_reports: 3, min_learning_rate: 1.0e-5, max_learning_rate: 1.0e-2}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for all that is read and written, beside a running cluster of two CPUs."""
    folder = tmp_path_factory.mktemp("sweep")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=128 * 2**20,
        log_to_driver=False,
    )
    yield folder
    ray.shutdown()


@pytest.fixture(scope="module")
def config(home: Path) -> Config:
    """Thirty-two plain pictures with captions, a random CLIP tower, everything prepared."""
    for split, first, count in (("train", 0, 24), ("val", 24, 8)):
        rows = [_row(home, f"{split}-{number}", list(COLOURS)[number % 4], first + number) for number in range(count)]
        (home / f"{split}.json").write_text(json.dumps(rows))
    text = {"text_hidden_size": 32, "text_layers": 1, "text_heads": 1, "max_text_tokens": 16, "projection_dim": 16}
    vision = {"image_size": 16, "patch_size": 8, "vision_hidden_size": 32, "vision_layers": 1, "vision_heads": 1}
    ids = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    save_clip(build_clip(**vision, **text, **ids, seed=0), home / "clip")
    (home / "sweep.yaml").write_text(SETTINGS.replace("HOME", os.path.relpath(home)))  # trials must not depend on cwd
    settings = load_config(home / "sweep.yaml")
    prepare_samples(settings)
    prepare_tokenizer(settings)
    return settings


def _row(home: Path, name: str, colour: str, number: int) -> dict[str, Any]:
    shade = tuple(max(0, value - number) for value in COLOURS[colour])
    Image.new("RGB", (16, 16), shade).save(home / f"{name}.png")
    turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": f"A {colour} square."}]
    return {"id": name, "image": f"{name}.png", "conversations": turns}


@pytest.fixture(scope="module")
def sweep(config: Config) -> tuple[SearchResult, list[str]]:
    """The search's result, and the names of the trials in the order in which they were announced."""
    prepare_features(config, str(config.clip.path))
    announced: list[str] = []
    return search(config, on_trial=lambda row: announced.append(row["name"])), announced


def test_every_trial_ran_and_the_best_has_the_lowest_loss(sweep):
    result, announced = sweep
    assert sorted(announced) == ["trial-0", "trial-1", "trial-2", "trial-3"]
    assert {row["status"] for row in result.trials} <= {"finished", "stopped"}
    assert result.best_val_loss == min(row["val_loss"] for row in result.trials)
    best = next(row for row in result.trials if row["val_loss"] == result.best_val_loss)
    assert [step for step, _ in best["curve"]] == [3, 6, 9]
    assert result.best_overrides == best["overrides"][:2]
    assert result.reproduce == best["overrides"]


def test_the_printed_overrides_find_the_best_trial_finished(home, sweep):
    result, _ = sweep
    changed = load_config(home / "sweep.yaml", result.reproduce)
    written = (run_dir(changed, "pretrain") / "result.json").stat().st_mtime_ns
    assert run_stage(changed, "pretrain").val_loss == result.best_val_loss
    assert (run_dir(changed, "pretrain") / "result.json").stat().st_mtime_ns == written


def test_ray_train_and_ray_data_give_the_same_weights_as_the_trial(home, sweep):
    changed = load_config(home / "sweep.yaml", sweep[0].reproduce)
    trained = weights(run_stage(changed, "pretrain"))
    shutil.move(run_dir(changed, "pretrain"), home / "the-trial")
    again = weights(run_stage(changed, "pretrain"))
    assert trained.keys() == again.keys()
    assert all(torch.equal(trained[name], again[name]) for name in trained)


def weights(result: StageResult) -> dict[str, torch.Tensor]:
    return load_file(result.export_dir / "model.safetensors")


def test_no_trial_encoded_a_picture(config, sweep):
    stat = prepare_features(config, str(config.clip.path)).stat()
    assert (stat.distinct, stat.encoded) == (32, 32)


def test_only_the_best_trial_keeps_its_training_state(home, sweep):
    result, _ = sweep
    for row in result.trials:
        folder = run_dir(load_config(home / "sweep.yaml", row["overrides"]), "pretrain")
        assert bool(list(folder.glob("checkpoints/*/engine"))) == (row["val_loss"] == result.best_val_loss)


def test_the_same_search_again_is_read_from_disk(config, sweep):
    result, announced = sweep
    again = search(config, on_trial=lambda row: announced.append(row["name"]))
    assert (again.best_overrides, again.best_val_loss) == (result.best_overrides, result.best_val_loss)
    assert len(announced) == 4


def test_a_diverged_trial_never_wins():
    diverged = TrialRow("a", [], [(1, 1.0), (2, math.nan)], status="failed", val_loss=math.nan, error="boom")
    worse, better = TrialRow("b", [], [(2, 3.0)], val_loss=3.0), TrialRow("c", [], [(2, 2.0)], val_loss=2.0)
    assert best_trial([diverged, worse, better]) == (2, 2.0)
    died = TrialRow("d", [], [(1, 0.5)], status="failed", val_loss=0.5, error="boom")
    assert best_trial([died, worse, better]) == (2, 2.0)
    with pytest.raises(ConfigError, match="Every trial failed, the first with: boom"):
        best_trial([diverged])
