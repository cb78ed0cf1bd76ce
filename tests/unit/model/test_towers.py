"""Vision towers other than the CLIP that is trained here: SigLIP, larger CLIPs, vision halves, damaged folders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from minivlm.config import Config
from minivlm.data.chat import encode_prompt
from minivlm.data.settings import num_image_tokens, tower_shape
from minivlm.inference.verify import TOLERANCE, verify_export
from minivlm.model.export import load_export, load_export_tower, save_export
from minivlm.model.generate import Prompt, generate
from minivlm.model.image_tokens import count_features
from minivlm.model.vision import VisionTower
from minivlm.schema import Message

QUESTION = "what colour is it?"
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
PUBLISHED = [
    (CLIPVisionConfig(image_size=224, patch_size=32), 50, 768, 87.5),
    (CLIPVisionConfig(image_size=224, patch_size=14, **CLIP_L), 257, 1024, 303.2),
    (CLIPVisionConfig(image_size=336, patch_size=14, **CLIP_L), 577, 1024, 303.5),
    (SiglipVisionConfig(image_size=224, patch_size=16), 196, 768, 92.9),
    (SiglipVisionConfig(image_size=384, patch_size=14, **SO400M), 729, 1152, 428.2),
]
NAMES = ["clip-b-32-224", "clip-l-14-224", "clip-l-14-336", "siglip-b-16-224", "siglip-so400m-14-384"]


@pytest.mark.parametrize(("vision", "features", "width", "millions"), PUBLISHED, ids=NAMES)
def test_published_towers_have_their_tokens(tmp_path, vision, features, width, millions):
    """From config.json alone; the parameters, counted on the meta device, show that it is that tower."""
    model_class = SiglipVisionModel if vision.model_type.startswith("siglip") else CLIPVisionModel
    with torch.device("meta"):
        model = model_class(vision)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions
    vision.save_pretrained(tmp_path)
    config = Config(clip={"path": str(tmp_path)})
    assert tower_shape(config) == (features, width)
    assert num_image_tokens(config) == features
    assert model.embeddings.num_positions == features


@pytest.mark.parametrize(
    ("vision", "factor", "tokens"), [(PUBLISHED[0][0], 2, 16), (PUBLISHED[2][0], 2, 144), (PUBLISHED[4][0], 3, 81)]
)
def test_image_tokens_follow_the_projector(tmp_path, vision, factor, tokens):
    vision.save_pretrained(tmp_path)
    model = {"projector": "pixel_shuffle", "pixel_shuffle_factor": factor}
    assert num_image_tokens(Config(clip={"path": str(tmp_path)}, model=model)) == tokens
    resampler = {"projector": "resampler", "resampler_queries": 64}
    assert num_image_tokens(Config(clip={"path": str(tmp_path)}, model=resampler)) == 64


@pytest.mark.parametrize("layer", [-1, -2])
def test_siglip_features_are_a_layers_own_outputs(siglip_folder, pictures, layer):
    tower = VisionTower.load(siglip_folder, feature_layer=layer, batch_size=4)
    pixel_values = tower.preprocess(pictures)
    with torch.no_grad():
        stock = SiglipVisionModel.from_pretrained(siglip_folder)(pixel_values, output_hidden_states=True)
    assert (tower.num_features, tower.hidden_size) == (4, 32)
    assert_close(tower.encode_exact(pixel_values), stock.hidden_states[layer], atol=1e-5, rtol=0)
    assert (stock.last_hidden_state - stock.hidden_states[-1]).abs().max() > 0.1  # the norm that LLaVA does not read


def test_siglip_pictures_are_squeezed_to_the_square_not_cropped(siglip_folder, pictures):
    tower = VisionTower.load(siglip_folder, batch_size=4)
    expected = SiglipImageProcessorPil.from_pretrained(siglip_folder)(images=pictures, return_tensors="pt")
    assert torch.equal(tower.preprocess(pictures), expected["pixel_values"])
    assert tower.preprocess(pictures).shape == (8, 3, 32, 32)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_whole_model_and_vision_half_are_the_same_tower(request, tmp_path, family):
    whole = request.getfixturevalue(f"{family}_folder")
    tower = VisionTower.load(whole, batch_size=4)
    stock = SiglipVisionModel if family == "siglip" else CLIPVisionModel
    stock.from_pretrained(whole).save_pretrained(tmp_path)
    tower.image_processor.save_pretrained(tmp_path)
    assert VisionTower.load(str(tmp_path), batch_size=4).fingerprint == tower.fingerprint


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_tower_with_more_or_fewer_layers_than_its_config_is_refused(request, tmp_path, family):
    whole = VisionTower.load(request.getfixturevalue(f"{family}_folder"), batch_size=4)
    whole.model.save_pretrained(tmp_path) if family == "clip" else SiglipVisionModel.from_pretrained(
        request.getfixturevalue("siglip_folder")
    ).save_pretrained(tmp_path)
    whole.image_processor.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="weights matched, 16 unexpected"):
        VisionTower.load(str(tmp_path), batch_size=4)
    path.write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="weights matched, 16 missing"):
        VisionTower.load(str(tmp_path), batch_size=4)


def test_an_image_processor_of_another_size_is_refused(siglip_folder, tmp_path):
    SiglipVisionModel.from_pretrained(siglip_folder).save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"gives \(48, 48\) px, but the vision tower reads 32 x 32"):
        VisionTower.load(str(tmp_path), batch_size=4)


def test_other_architectures_say_what_to_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match=r"is a `vit`, no CLIP or SigLIP.*type clip\.path=|Type clip\.path="):
        VisionTower.load(str(tmp_path), batch_size=4)
    with pytest.raises(ValueError, match="only squares"):
        count_features(SiglipVisionConfig(image_size=[224, 448]))


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_stock_transformers_computes_the_same_with_siglip(
    tmp_path, make_vlm, siglip_folder, tokenizer_folder, pictures, projector, layer
):
    vlm = make_vlm("qwen3", projector)
    save_export(tmp_path, vlm, tower_path=siglip_folder, feature_layer=layer, tokenizer_dir=tokenizer_folder)
    stock, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    processor, loaded = AutoProcessor.from_pretrained(tmp_path), load_export(tmp_path)
    tower = load_export_tower(tmp_path, batch_size=8)
    assert loaded.num_image_tokens == 4
    assert tower.fingerprint == VisionTower.load(siglip_folder, feature_layer=layer, batch_size=8).fingerprint
    typed = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(typed, add_generation_prompt=True)
    ids = encode_prompt(loaded.tokenizer, [Message("user", f"<image>\n{QUESTION}")], 4, num_images=1)
    for picture, feature in zip(pictures, tower.encode_exact(tower.preprocess(pictures)), strict=True):
        inputs = processor(images=picture, text=text, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == ids
        with torch.no_grad():
            embeds = loaded.vlm.embed(inputs["input_ids"], feature[None], torch.tensor([0]))
            assert_close(
                loaded.vlm.language_model(inputs_embeds=embeds).logits, stock(**inputs).logits, atol=1e-5, rtol=0
            )
            answer = generate(loaded.vlm, [Prompt(ids, feature[None])], max_new_tokens=8, eos_token_id=-1)[0]
            new = stock.generate(**inputs, max_new_tokens=8, eos_token_id=-1)[0, len(ids) :].tolist()
        assert new == answer


def test_an_export_with_siglip_verifies_and_has_the_hub_names(
    tmp_path, make_vlm, siglip_folder, tokenizer_folder, pictures
):
    save_export(tmp_path, make_vlm(), tower_path=siglip_folder, tokenizer_dir=tokenizer_folder)
    found = verify_export(tmp_path, [(picture, QUESTION) for picture in pictures[:2]])
    assert found.is_stock
    assert found.max_logit_difference <= TOLERANCE
    towers = {name for name in load_file(tmp_path / "model.safetensors") if name.startswith("vision_tower.")}
    assert all(name.startswith("vision_tower.vision_model.") for name in towers)
    assert "vision_tower.vision_model.head.probe" in towers


def test_an_export_that_lost_a_weight_of_siglip_is_refused(tmp_path, make_vlm, siglip_folder, tokenizer_folder):
    save_export(tmp_path, make_vlm(), tower_path=siglip_folder, tokenizer_dir=tokenizer_folder)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing.*fc1\.bias"):
        load_export(tmp_path)
    with pytest.raises(ValueError, match="no complete vision tower"):
        load_export_tower(tmp_path, batch_size=1)
