"""`jobs.export --verify`: plain transformers and this project must agree on the exported folder."""

import json

import pytest
from safetensors.torch import load_file, save_file

from minivlm.inference.verify import TOLERANCE, verify_export
from minivlm.model.checkpoint import CheckpointError
from minivlm.model.export import save_export

QUESTION = "what colour is it?"


@pytest.fixture
def folder(tmp_path, make_vlm, clip_folder, tokenizer_folder):
    save_export(tmp_path / "export", make_vlm(), tower_path=clip_folder, tokenizer_dir=tokenizer_folder)
    return tmp_path / "export"


def test_an_export_means_the_same_to_transformers(folder, pictures):
    found = verify_export(folder, [(picture, QUESTION) for picture in pictures])
    assert found.num_pictures == len(pictures) >= 2
    assert found.max_logit_difference <= TOLERANCE


def test_another_chat_template_is_found_out(folder, pictures):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "helper"))
    with pytest.raises(CheckpointError, match="reads a question as other tokens"):
        verify_export(folder, [(pictures[0], QUESTION)])


def test_another_way_of_decoding_is_found_out(folder, pictures):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 5.0}))
    with pytest.raises(CheckpointError, match="transformers answers"):
        verify_export(folder, [(pictures[0], QUESTION)])


def test_logits_that_are_no_numbers_are_not_equal(folder, pictures):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight" if "lm_head.weight" in weights else "language_model.lm_head.weight"].fill_(3e38)
    save_file(weights, path, metadata={"format": "pt"})
    (folder / "minivlm.json").unlink()  # the head differs from the embedding now
    with pytest.raises(CheckpointError, match="logits differ by nan"):
        verify_export(folder, [(pictures[0], QUESTION)])
