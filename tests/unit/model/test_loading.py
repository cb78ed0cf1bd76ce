"""Weights that are read are all of the model's, in its shapes, and numbers; else the message counts and names them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minivlm.model.checkpoint import CheckpointError
from minivlm.model.export import load_export, load_export_tower
from minivlm.model.language import build_language_model
from minivlm.model.vision import VisionTower
from minivlm.train.shards import SavedShards, Shard, save_shards
from tests.tiny_export import build_export

Weights = dict[str, Tensor]
NORM = "model.norm.weight"
LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_export(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def language(export: Path) -> Path:
    """A folder of a language model with a tied head and one layer: 13 tensors."""
    folder = export.with_name("language")
    load_export(export).vlm.language_model.save_pretrained(folder)
    return folder


def rewritten(folder: Path, target: Path, change: Callable[[Weights], Weights]) -> str:
    """A copy with other weights."""
    shutil.copytree(folder, target)
    weights = change(load_file(folder / "model.safetensors"))
    tensors = {name: value.clone() for name, value in weights.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def load_language(path: str) -> torch.nn.Module:
    return build_language_model(path=path, architecture="qwen3", sizes={}, vocab_size=320, seed=0)


def with_another_layer(weights: Weights, number: str = "7") -> Weights:
    return weights | {
        name.replace(".layers.0.", f".layers.{number}."): value for name, value in weights.items() if ".layers." in name
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: {name.replace(LAYER, "transformer.h.0."): value for name, value in weights.items()},
            r"3 weights matched, 11 missing \['model\.layers\.0\.input_layernorm.*11 unexpected \['transformer\.h\.0",
        ),
        (with_another_layer, r"14 weights matched, 11 unexpected \['model\.layers\.7\.input_layernorm\.weight'"),
        (
            lambda weights: weights | {NORM: torch.ones(3)},
            r"13 weights matched, 1 of another shape \['model\.norm\.weight \(3,\) instead of \(32,\)'\]",
        ),
        (
            lambda weights: weights | {NORM: weights[NORM] / 0},
            r"14 weights matched, 1 not finite \['model\.norm\.weight'",
        ),
        (lambda weights: {NORM: weights[NORM]}, r"1 weights matched, 13 missing \['lm_head\.weight'"),
    ],
    ids=["renamed", "a layer too many", "another shape", "infinite", "nearly empty"],
)
def test_a_language_model_is_read_whole_or_not_at_all(
    language: Path, tmp_path: Path, change: Callable[[Weights], Weights], message: str
):
    with pytest.raises(ValueError, match=message):
        load_language(rewritten(language, tmp_path / "changed", change))


def test_a_head_in_the_file_of_a_tied_model_is_kept_and_no_longer_called_tied(language: Path, tmp_path: Path):
    head = torch.randn(320, 32)
    model = load_language(rewritten(language, tmp_path / "own", lambda weights: weights | {"lm_head.weight": head}))
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert model.config.tie_word_embeddings is False
    same = load_language(str(language))
    assert same.get_output_embeddings().weight is same.get_input_embeddings().weight
    assert same.config.tie_word_embeddings is True


def test_code_in_a_folder_is_not_run_whatever_is_answered(
    language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("builtins.input", lambda prompt: "y")  # transformers asks unless it is told not to
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(language, folder)
    path = folder / "config.json"
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "own", "auto_map": auto_map}))
    (folder / "code.py").write_text(f"import pathlib; pathlib.Path({str(ran)!r}).touch()")
    with pytest.raises(ValueError, match="No language model under"):
        build_language_model(path=str(folder), architecture="qwen3", sizes={}, vocab_size=64, seed=0)
    assert not ran.exists()


def test_a_tower_is_read_whole_or_not_at_all(export: Path, tmp_path: Path):
    clip = export.with_name("clip")
    changes: list[tuple[Callable[[Weights], Weights], str]] = [
        (with_another_layer, r"23 weights matched, 16 unexpected"),
        (
            lambda weights: {name: value for name, value in weights.items() if "vision_model.encoder" not in name},
            r"7 weights matched, 16 missing \['encoder\.layers\.0\.",
        ),
        (
            lambda weights: weights | {"vision_model.post_layernorm.weight": torch.ones(3)},
            r"22 weights matched, 1 of another shape",
        ),
    ]
    for number, (change, message) in enumerate(changes):
        with pytest.raises(ValueError, match=message):
            VisionTower.load(rewritten(clip, tmp_path / str(number), change), batch_size=2)


def test_an_export_is_read_whole_or_not_at_all(export: Path, tmp_path: Path):
    bias = "multi_modal_projector.linear_1.bias"
    folder = Path(rewritten(export, tmp_path / "shape", lambda weights: weights | {bias: torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"40 weights matched, 1 of another shape.*linear_1\.bias \(3,\) instead"):
        load_export(folder)
    folder = Path(rewritten(export, tmp_path / "layer", with_another_layer))
    with pytest.raises(CheckpointError, match=r"23 weights matched, 16 unexpected"):
        load_export_tower(folder, batch_size=2)


def test_training_state_of_another_model_is_refused(tmp_path: Path):
    engine = tmp_path / "step=00000001" / "engine"
    save_shards(engine, 0, [Shard("a", "master", 0, torch.ones(4)), Shard("b", "master", 0, torch.ones(2))])
    save_shards(engine, 1, [Shard("b", "master", 2, torch.zeros(3))])
    saved = SavedShards(engine)
    saved.check({"a": 4, "b": 5})
    assert saved.read("b", "master", 1, 3).tolist() == [1, 0, 0]
    with pytest.raises(
        CheckpointError, match=r"0 weights matched, 1 missing \['c'\], 1 unexpected \['b'\], 1 of another"
    ):
        saved.check({"a": 5, "c": 5})
    with pytest.raises(CheckpointError, match=r"lacks master of b from element 5 on"):
        saved.read("b", "master", 3, 3)
