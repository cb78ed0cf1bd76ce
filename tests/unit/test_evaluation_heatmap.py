"""Where answers look: weights equal to a plain eager forward, places in the picture, overlays."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from minivlm.data.chat import encode_prompt
from minivlm.data.images import ImageLimits
from minivlm.evaluation.heatmap import choose_questions, describe, overlay
from minivlm.evaluation.tasks import Question
from minivlm.inference.attention import Answered, look_all, look_one
from minivlm.model.attention import answer_attention, token_grid
from minivlm.model.export import load_export, load_export_tower
from minivlm.model.generate import Prompt
from minivlm.model.projector import build_projector
from minivlm.schema import Message
from minivlm.storage import file_sha256
from tests.tiny_export import NUM_IMAGE_TOKENS, PROJECTOR_SIZES, build_export, png

TURN = (Message("user", "<image>\nwhat?"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_export(tmp_path_factory.mktemp("tiny"))


def test_weights_equal_those_of_one_eager_forward(folder: Path) -> None:
    export = load_export(folder)
    messages = [Message("user", "<image> and <image>: what?")]
    ids = encode_prompt(export.tokenizer, messages, export.num_image_tokens, num_images=2)
    features = torch.randn(2, NUM_IMAGE_TOKENS, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    answer = [20, 21, 22]
    found = answer_attention(export.vlm, Prompt(ids, features), answer)
    decoder = export.vlm.language_model.get_decoder()
    assert decoder.config._attn_implementation == "sdpa"
    decoder.set_attn_implementation("eager")
    whole = torch.tensor([[*ids, *answer[:-1]]])
    embeds = export.vlm.embed(whole, features, torch.arange(2))
    with torch.no_grad():
        layers = decoder(inputs_embeds=embeds, output_attentions=True, use_cache=False).attentions
    deciding = layers[-1][0].mean(dim=0)[len(ids) - 1 :]
    expected = deciding.mean(dim=0)[whole[0] == export.image_token_id].reshape(2, -1)
    assert_close(found, expected, atol=1e-6, rtol=0)
    assert 0 < float(found.sum()) < 1


def test_tokens_lie_where_their_patches_are() -> None:
    weights = torch.arange(5.0)
    mlp = build_projector("mlp2x_gelu", 4, 4)
    assert token_grid(weights, mlp, 5).tolist() == [[1, 2], [3, 4]]  # the class token comes first
    assert token_grid(weights[:4], mlp, 4).tolist() == [[0, 1], [2, 3]]
    shuffle = build_projector("pixel_shuffle", 4, 4, num_features=10, sizes={"pixel_shuffle_factor": 2})
    squares = token_grid(torch.tensor([4.0, 8.0, 12.0, 16.0]), shuffle, 10)  # 3 x 3 patches in 2 x 2 squares
    assert squares.tolist() == [[1, 1, 2], [1, 1, 2], [3, 3, 4]]
    resampler = build_projector("resampler", 32, 32, num_features=5, sizes=PROJECTOR_SIZES)
    assert token_grid(torch.ones(3), resampler, 5) is None


def test_the_brightest_patch_is_the_most_looked_at() -> None:
    drawn = np.asarray(overlay(np.full((8, 8, 3), 100, np.uint8), np.array([[0.0, 0.0], [0.0, 0.02]])), dtype=int)
    assert drawn.shape == (160, 160, 3)
    assert drawn[-1, -1].tolist() == [178, 125, 65]  # half the picture, half (255, 150, 30)
    assert drawn[0, 0].tolist() == [60, 62, 80]  # half the picture, half (20, 24, 60)
    with pytest.raises(ValueError, match="finite"):
        overlay(np.zeros((8, 8, 3), np.uint8), np.array([[float("nan")]]))


def test_all_checkpoints_are_shown_on_the_same_questions_of_all_tasks() -> None:
    def question(task: str, number: int, pictures: int = 1) -> Question:
        return Question(f"{task}{number}", task, "en", ("a",) * pictures, ("a",) * pictures, TURN, "", "")

    asked = [question("caption", 0), question("b", 0, pictures=0), question("b", 1), question("c", 0), question("b", 2)]
    assert choose_questions(asked, 4) == [2, 3, 0, 4]
    assert choose_questions(asked, 0) == []


def test_an_answer_is_looked_at_on_the_picture_as_the_tower_saw_it(folder: Path, tmp_path: Path) -> None:
    export, tower = load_export(folder), load_export_tower(folder, batch_size=1)
    picture = Image.new("RGB", (40, 30), (200, 30, 40))
    looked = look_one(export, tower, [picture], Answered(TURN, (), (), "red"))
    assert looked.seen[0].shape == (32, 32, 3)
    assert np.abs(looked.seen[0].astype(int) - [200, 30, 40]).max() <= 1
    assert looked.grids[0].shape == (2, 2)
    assert looked.grids[0].sum() <= looked.share < 1
    told = describe(looked.seen, looked.grids, looked.share)
    assert told["overlays"][0].startswith("data:image/png;base64,")
    assert describe(looked.seen, (None,), looked.share) is None

    path = tmp_path / "a.png"
    path.write_bytes(png())
    limits = ImageLimits(1 << 20, 1 << 20, 1 << 10, 20.0)
    there = Answered(TURN, (str(path),), (file_sha256(path),), "")
    changed = Answered(TURN, (str(path),), ("0" * 64,), "red")
    found = look_all([(folder, [there, changed])], limits, "cpu", 1)
    assert found[0][0].grids[0].shape == (2, 2)
    assert found[0][1] is None
