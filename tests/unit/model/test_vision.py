"""The tower and the CLIP that we train: fixed batch shape, fingerprint, loss."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import CLIPModel

from minivlm.model.clip import build_clip, clip_loss
from minivlm.model.vision import VisionTower


@pytest.fixture
def tower(clip_folder):
    return VisionTower.load(clip_folder, batch_size=4)


def test_features_are_the_last_hidden_states_with_the_class_token(tower, clip_folder, pictures):
    pixel_values = tower.preprocess(pictures[:4])
    clip = CLIPModel.from_pretrained(clip_folder)
    with torch.no_grad():
        hidden_states = clip.vision_model(pixel_values, output_hidden_states=True).hidden_states
    assert torch.equal(tower.encode(pixel_values), hidden_states[-1].bfloat16())
    assert (tower.num_features, tower.hidden_size) == (5, 32)


@pytest.mark.parametrize("layer", [-2, -3])
def test_an_earlier_layer_can_be_read(clip_folder, pictures, layer):
    tower = VisionTower.load(clip_folder, feature_layer=layer, batch_size=4)
    pixel_values = tower.preprocess(pictures[:4])
    with torch.no_grad():
        vision = CLIPModel.from_pretrained(clip_folder).vision_model
        expected = vision(pixel_values, output_hidden_states=True).hidden_states[layer]
    assert torch.equal(tower.encode(pixel_values), expected.bfloat16())


def test_a_layer_that_the_tower_has_not_is_refused(clip_folder):
    with pytest.raises(ValueError, match=r"clip\.feature_layer is -9"):
        VisionTower.load(clip_folder, feature_layer=-9, batch_size=4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_picture_is_encoded_the_same_in_any_company(clip_folder, pictures, precision):
    tower = VisionTower.load(clip_folder, precision=precision, batch_size=4)
    pixel_values = tower.preprocess(pictures)
    together = tower.encode(pixel_values)
    assert together.dtype == torch.bfloat16
    for index in range(len(pictures)):
        assert torch.equal(tower.encode(pixel_values[index : index + 1])[0], together[index])
    assert torch.equal(tower.encode(pixel_values.flip(0)).flip(0), together)


def test_no_pictures_no_features(tower):
    assert tower.encode(tower.preprocess([])).shape == (0, 5, 32)


def test_fingerprint_names_all_that_matters(clip_folder):
    def fingerprint(**changes):
        return VisionTower.load(clip_folder, **({"batch_size": 4, "precision": "float32"} | changes)).fingerprint

    others = [fingerprint(batch_size=8), fingerprint(precision="bfloat16"), fingerprint(feature_layer=-2)]
    altered = VisionTower.load(clip_folder, batch_size=4)
    altered.image_processor.image_mean = [0.5, 0.5, 0.5]
    altered.model.post_layernorm.bias.data += 1
    others.append(VisionTower(altered.model, altered.image_processor, batch_size=4).fingerprint)
    assert fingerprint() == fingerprint()
    assert len({fingerprint(), *others}) == 5


def test_missing_tower_says_what_to_type(tmp_path):
    with pytest.raises(ValueError, match=r"clip\.path=FOLDER"):
        VisionTower.load(str(tmp_path), batch_size=4)


def test_clip_loss_matches_hand_value():
    # Orthogonal pairs at scale 1: log(e + 1) - 1 in each direction.
    loss = clip_loss(torch.eye(2), 3 * torch.eye(2), torch.zeros(()), torch.zeros(2, 2, dtype=torch.bool))
    assert math.isclose(loss.item(), math.log(math.e + 1) - 1, rel_tol=1e-6)


def test_equal_captions_are_no_negatives():
    embeds = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    captions = torch.tensor([0, 0, 1])
    is_duplicate = captions[:, None] == captions[None, :]
    loss = clip_loss(embeds, embeds, torch.zeros(()), is_duplicate)
    # Pairs 0 and 1 meet one negative, pair 2 meets two.
    expected = (2 * math.log1p(math.exp(-1)) + math.log1p(2 * math.exp(-1))) / 3
    assert_close(loss, torch.tensor(expected))


def test_text_is_read_at_the_first_end_token(clip_folder):
    clip = CLIPModel.from_pretrained(clip_folder)
    short, padded = torch.tensor([[1, 50, 7, 0]]), torch.tensor([[1, 50, 7, 0, 0, 0]])
    with torch.no_grad():
        embeds = [clip.get_text_features(input_ids=ids).pooler_output for ids in (short, padded)]
        other = clip.get_text_features(input_ids=torch.tensor([[1, 50, 8, 0]])).pooler_output
    assert_close(embeds[0], embeds[1])
    assert (embeds[0] - other).abs().max() > 1e-3


def test_end_token_two_is_refused():
    sizes = {"image_size": 32, "patch_size": 16, "max_text_tokens": 8, "projection_dim": 8, "vocab_size": 8, "seed": 0}
    parts = {f"{part}_{field}": 8 for part in ("vision", "text") for field in ("hidden_size", "layers", "heads")}
    with pytest.raises(ValueError, match="eos_token_id is 2"):
        build_clip(**sizes, **parts, bos_token_id=1, eos_token_id=2, pad_token_id=0)
