"""Exports whose projector stock LLaVA has not: they say so, transformers stops, and our loader reads them exactly."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from minivlm.config import Config
from minivlm.config.model import ProjectorKind
from minivlm.inference.verify import TOLERANCE, verify_export
from minivlm.model.checkpoint import CheckpointError
from minivlm.model.export import load_export, load_export_tower, save_export
from minivlm.model.image_tokens import PROJECTOR_SIZES
from minivlm.model.llava import is_stock
from minivlm.model.vision import VisionTower

OWN = {
    "pixel_shuffle": {"kind": "pixel_shuffle", "pixel_shuffle_factor": 2},
    "resampler": {"kind": "resampler", "resampler_queries": 3, "resampler_layers": 2, "resampler_heads": 4},
}
TOKENS = {"pixel_shuffle": 1, "resampler": 3}
QUESTION = "what colour is it?"


@pytest.fixture(params=list(OWN))
def kind(request):
    return request.param


@pytest.fixture
def exported(tmp_path, make_vlm, clip_folder, tokenizer_folder):
    """exported(kind, architecture, tied) -> folder, our model."""

    def export(kind, architecture="qwen3", tied=True):
        vlm = make_vlm(architecture, kind, tied=tied)
        save_export(tmp_path / "export", vlm, tower_path=clip_folder, tokenizer_dir=tokenizer_folder)
        return tmp_path / "export", vlm

    return export


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("tied", [True, False])
def test_reading_it_back_is_bit_equal(exported, clip_folder, kind, architecture, tied):
    folder, vlm = exported(kind, architecture, tied)
    loaded = load_export(folder)
    ours, theirs = vlm.state_dict(), loaded.vlm.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert loaded.num_image_tokens == TOKENS[kind]
    if architecture == "llama":  # experts are many on disk and one in memory
        assert loaded.matched_keys == len(load_file(folder / "model.safetensors"))
    features = torch.randn(2, 5, 32)
    assert torch.equal(loaded.vlm.projector(features), vlm.projector(features))
    tower = VisionTower.load(clip_folder, batch_size=2)
    assert load_export_tower(folder, batch_size=2).fingerprint == tower.fingerprint


def test_the_folder_says_what_it_is(exported, kind):
    folder, vlm = exported(kind)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "minivlm_llava"
    assert config["minivlm_projector"] == OWN[kind]
    assert config["image_seq_length"] == TOKENS[kind]
    names = {name for name in load_file(folder / "model.safetensors") if name.startswith("multi_modal_projector.")}
    assert names == {f"multi_modal_projector.{name}" for name in vlm.projector.state_dict()}
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".jinja"}


def test_transformers_stops_instead_of_filling_in_random_weights(exported, kind):
    folder, _ = exported(kind)
    with pytest.raises(ValueError, match="minivlm_llava"):
        AutoModelForImageTextToText.from_pretrained(folder)
    with pytest.raises(KeyError, match=kind):
        LlavaForConditionalGeneration.from_pretrained(folder)


def test_cached_features_and_the_picture_itself_give_the_same(exported, pictures, kind):
    folder, _ = exported(kind)
    found = verify_export(folder, [(picture, QUESTION) for picture in pictures])
    assert (found.num_pictures, found.is_stock) == (8, False)
    assert found.max_logit_difference <= TOLERANCE


def test_another_chat_template_is_found_out(exported, pictures, kind):
    folder, _ = exported(kind)
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "helper"))
    with pytest.raises(CheckpointError, match="reads a question as other tokens"):
        verify_export(folder, [(pictures[0], QUESTION)])


def test_it_can_be_exported_again(exported, tmp_path, clip_folder, kind):
    folder, _ = exported(kind)
    save_export(tmp_path / "again", load_export(folder).vlm, tower_path=clip_folder, tokenizer_dir=folder)
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights.pop("multi_modal_projector.linear_1.bias"), r"1 missing.*linear_1\.bias"),
        (lambda weights: weights.update({"multi_modal_projector.extra": torch.zeros(1)}), "1 unexpected.*extra"),
        (
            lambda weights: weights.update({"multi_modal_projector.linear_1.weight": torch.zeros(2, 2)}),
            "1 of another shape",
        ),
    ],
)
def test_spoilt_weights_are_refused(exported, kind, change, reason):
    folder, _ = exported(kind)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=reason):
        load_export(folder)


@pytest.mark.parametrize(
    "field",
    [
        None,
        {},
        {"kind": "qformer"},
        {"kind": "resampler"},
        {"kind": "pixel_shuffle", "pixel_shuffle_factor": 0},
        {"kind": "pixel_shuffle", "pixel_shuffle_factor": "x"},
    ],
)
def test_a_description_that_means_nothing_is_refused(exported, field):
    folder, _ = exported("pixel_shuffle")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"minivlm_projector": field}))
    with pytest.raises(CheckpointError, match="describes no model of this project"):
        load_export(folder)
    with pytest.raises(CheckpointError, match="describes no model of this project"):
        load_export_tower(folder, batch_size=1)


@pytest.mark.parametrize("change", [{"model_type": "vit"}, {"patch_size": 0}, {"image_size": [32, 64]}])
def test_a_tower_that_we_do_not_run_is_refused(exported, kind, change):
    folder, _ = exported(kind)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"] |= change
    path.write_text(json.dumps(config))
    for load in (load_export, partial(load_export_tower, batch_size=1)):
        with pytest.raises(CheckpointError, match="describes no model of this project"):
            load(folder)


def test_settings_and_exports_agree_on_what_is_stock():
    kinds = ProjectorKind.__args__
    assert set(kinds) == set(PROJECTOR_SIZES)
    assert {k for k in kinds if Config(model={"projector": k}).model.is_stock_llava} == set(filter(is_stock, kinds))
    assert all(name in Config().model.projector_sizes for names in PROJECTOR_SIZES.values() for name in names)
