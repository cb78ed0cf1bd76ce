"""The published sizes, counted on the meta device, and the language models that settings describe."""

from pathlib import Path

import pytest
import torch

from minivlm.config import load_config
from minivlm.model.language import build_language_model, language_config, padded_vocab_size
from minivlm.model.projector import build_projector
from minivlm.model.vlm import MiniVLM, count_parameters

CONFIGS = Path(__file__).parents[3] / "configs"
CLIP_B32_WIDTH = 768
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize(
    ("preset", "millions"), [("minimind-v-v1-small", 27.27), ("minimind-v-v1", 109.34), ("minimind-v-moe", 79.19)]
)
def test_preset_has_the_published_size(preset, millions):
    config = load_config(CONFIGS / f"{preset}.yaml")
    text = config.model.language_model
    with torch.device("meta"):
        language_model = build_language_model(
            path=text.path,
            architecture=text.architecture,
            sizes=text.model_dump(exclude={"path", "architecture"}),
            vocab_size=config.tokenizer.vocab_size,
            seed=0,
        )
        projector = build_projector(config.model.projector, CLIP_B32_WIDTH, text.hidden_size)
    counts = count_parameters(MiniVLM(projector, language_model, 3))
    assert round(sum(counts.values()) / 1e6, 2) == millions


def test_vocabulary_is_padded_to_64():
    assert [padded_vocab_size(size) for size in (1, 64, 65, 6400)] == [64, 64, 128, 6400]


def test_same_seed_same_weights_and_the_global_generator_is_untouched():
    def build(seed):
        model = build_language_model(path=None, architecture="llama", sizes=SIZES, vocab_size=64, seed=seed)
        return model.get_input_embeddings().weight

    torch.manual_seed(7)
    first = build(1)
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(first, build(1))
    assert not torch.equal(first, build(2))


def test_model_from_a_folder_gets_room_for_the_new_tokens(tmp_path):
    original = build_language_model(path=None, architecture="qwen3", sizes=SIZES, vocab_size=64, seed=0)
    original.save_pretrained(tmp_path)
    loaded = build_language_model(path=str(tmp_path), architecture="llama", sizes={}, vocab_size=70, seed=0)
    weight = loaded.get_input_embeddings().weight
    assert weight.shape == (128, 64)
    assert torch.equal(weight[:64], original.get_input_embeddings().weight)
    assert loaded.get_output_embeddings().weight is weight
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("gpt2", {}, "architecture is `gpt2`"),
        ("qwen2", {"head_dim": 16}, "num_attention_heads x head_dim is 32"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=2"),
    ],
)
def test_impossible_sizes_say_what_to_type(architecture, changes, reason):
    with pytest.raises(ValueError, match=reason):
        language_config(architecture, SIZES | changes, 64)


def test_missing_folder_and_unknown_projector_say_what_to_type(tmp_path):
    with pytest.raises(ValueError, match=r"model\.language_model\.path=FOLDER"):
        build_language_model(path=str(tmp_path), architecture="llama", sizes={}, vocab_size=64, seed=0)
    with pytest.raises(ValueError, match=r"model\.projector=linear"):
        build_projector("qformer", 32, 64)
