"""The export is a stock LLaVA: other libraries load it, and it computes what ours computes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor

from minivlm.data.chat import encode_prompt
from minivlm.model.checkpoint import CheckpointError
from minivlm.model.export import load_export, load_export_tower, save_export
from minivlm.model.generate import Prompt, generate
from minivlm.model.vision import VisionTower
from minivlm.schema import Message

QUESTION = "<image>\nwhat colour is it?"


@pytest.fixture
def exported(tmp_path, make_vlm, clip_folder, tokenizer_folder):
    """exported(architecture, projector, tied) -> folder, our model."""

    def export(architecture="qwen3", projector="mlp2x_gelu", tied=True):
        vlm = make_vlm(architecture, projector, tied=tied)
        save_export(tmp_path / "export", vlm, tower_path=clip_folder, tokenizer_dir=tokenizer_folder)
        return tmp_path / "export", vlm

    return export


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_stock_transformers_computes_the_same(exported, clip_folder, pictures, architecture, projector):
    folder, vlm = exported(architecture, projector)
    stock, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    processor = AutoProcessor.from_pretrained(folder)
    typed = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]}]
    text = processor.apply_chat_template(typed, add_generation_prompt=True)
    tower, loaded = VisionTower.load(clip_folder, batch_size=8), load_export(folder)
    features = tower.encode_exact(tower.preprocess(pictures))
    ids = encode_prompt(loaded.tokenizer, [Message("user", QUESTION)], loaded.num_image_tokens, num_images=1)
    answers = generate(
        vlm,
        [Prompt(ids, feature[None]) for feature in features],
        max_new_tokens=12,
        eos_token_id=loaded.tokenizer.eos_token_id,
    )
    for picture, feature, answer in zip(pictures, features, answers, strict=True):
        inputs = processor(images=picture, text=text, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == ids
        with torch.no_grad():
            theirs = stock(**inputs).logits
            embeds = vlm.embed(inputs["input_ids"], feature[None], torch.tensor([0]))
            assert_close(vlm.language_model(inputs_embeds=embeds).logits, theirs, atol=1e-5, rtol=0)
            new = stock.generate(**inputs, max_new_tokens=12)[0, len(ids) :].tolist()
        assert [token for token in new if token not in (0, 2)] == [token for token in answer if token not in (0, 2)]


def test_an_earlier_layer_of_the_tower_is_written_and_read(tmp_path, make_vlm, clip_folder, tokenizer_folder, pictures):
    vlm = make_vlm("qwen3", "linear")
    places = {"tower_path": clip_folder, "tokenizer_dir": tokenizer_folder}
    save_export(tmp_path, vlm, feature_layer=-2, **places)
    stock, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    tower = load_export_tower(tmp_path, batch_size=1)
    assert tower.fingerprint == VisionTower.load(clip_folder, feature_layer=-2, batch_size=1).fingerprint
    ids = encode_prompt(load_export(tmp_path).tokenizer, [Message("user", QUESTION)], 5, num_images=1)
    pixel_values = processor.image_processor(images=pictures[:1], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        theirs = stock(input_ids=torch.tensor([ids]), pixel_values=pixel_values).logits
        embeds = vlm.embed(torch.tensor([ids]), tower.encode_exact(pixel_values), torch.tensor([0]))
        assert_close(vlm.language_model(inputs_embeds=embeds).logits, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("tied", [True, False])
def test_reading_it_back_is_bit_equal(exported, projector, architecture, tied):
    folder, vlm = exported(architecture, projector, tied)
    loaded = load_export(folder)
    ours, theirs = vlm.state_dict(), loaded.vlm.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    language_model = loaded.vlm.language_model
    assert (language_model.lm_head.weight is language_model.model.embed_tokens.weight) == tied
    assert (loaded.image_token_id, loaded.num_image_tokens) == (3, 5)


def test_a_loaded_export_can_be_exported_again(exported, tmp_path, clip_folder):
    folder, _ = exported("llama", "linear")
    save_export(tmp_path / "again", load_export(folder).vlm, tower_path=clip_folder, tokenizer_dir=folder)
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_have_the_hub_names(exported):
    folder, _ = exported("llama")
    names = load_file(folder / "model.safetensors").keys()
    assert {name for name in names if "layers" not in name} == {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
        "multi_modal_projector.linear_1.bias",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
        "multi_modal_projector.linear_2.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.embeddings.position_embedding.weight",
        "vision_tower.vision_model.post_layernorm.bias",
        "vision_tower.vision_model.post_layernorm.weight",
        "vision_tower.vision_model.pre_layrnorm.bias",
        "vision_tower.vision_model.pre_layrnorm.weight",
    }


def test_config_says_what_other_engines_ask(exported):
    folder, _ = exported("qwen3", "linear")
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["architectures"] == ["Qwen3ForCausalLM"]
    assert config["text_config"]["vocab_size"] % 64 == 0
    expected = {
        "model_type": "llava",
        "image_token_index": 3,
        "image_seq_length": 5,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "linear",
        "multimodal_projector_bias": False,
        "tie_word_embeddings": False,
    }
    assert {key: config[key] for key in expected} == expected
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([2], 0)


def test_only_safetensors_and_text_files(exported):
    folder, _ = exported()
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".jinja"}


def test_tower_of_the_export_has_the_same_fingerprint(exported, clip_folder, pictures):
    folder, _ = exported()
    first, second = VisionTower.load(clip_folder, batch_size=4), load_export_tower(folder, batch_size=4)
    assert first.fingerprint == second.fingerprint
    pixel_values = first.preprocess(pictures[:3])
    assert torch.equal(second.preprocess(pictures[:3]), pixel_values)
    assert torch.equal(first.encode(pixel_values), second.encode(pixel_values))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights.pop("language_model.model.norm.weight"), "1 missing.*language_model.norm.weight"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "1 unexpected.*extra"),
        (lambda weights: weights["language_model.lm_head.weight"].add_(1), "head is tied, but it differs"),
        (lambda weights: weights["multi_modal_projector.linear_2.weight"].add_(1), "none of ours"),
    ],
)
def test_spoilt_weights_are_refused(exported, change, reason):
    folder, _ = exported("llama", "linear")
    change_weights(folder, change)
    with pytest.raises(CheckpointError, match=reason):
        load_export(folder)


def test_truncated_and_missing_exports_are_refused(exported, tmp_path):
    folder, _ = exported()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_export(folder)
    with pytest.raises(CheckpointError, match="no complete vision tower"):
        load_export_tower(folder, batch_size=4)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_export(tmp_path / "nothing")


def test_rounded_weights_are_refused(make_vlm, tmp_path, clip_folder, tokenizer_folder):
    with pytest.raises(ValueError, match="float32"):
        save_export(tmp_path, make_vlm().bfloat16(), tower_path=clip_folder, tokenizer_dir=tokenizer_folder)


def test_tokenizer_of_another_run_is_refused(make_vlm, tmp_path, clip_folder, tokenizer_folder):
    vlm = make_vlm()
    vlm.image_token_id = 9
    with pytest.raises(ValueError, match="is 3, but the model was trained with 9"):
        save_export(tmp_path, vlm, tower_path=clip_folder, tokenizer_dir=tokenizer_folder)
