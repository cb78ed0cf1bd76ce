"""Small random models and batches for the model tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import SiglipConfig, SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from minivlm.data.tokenizer import train_tokenizer
from minivlm.model.clip import build_clip, save_clip
from minivlm.model.language import build_language_model
from minivlm.model.projector import build_projector
from minivlm.model.vlm import MiniVLM

IMAGE_TOKEN = 3
NUM_IMAGE_TOKENS = 5
VISION_SIZE = 32
PROJECTOR_SIZES = {
    "pixel_shuffle_factor": 2,
    "resampler_queries": 3,
    "resampler_layers": 2,
    "resampler_heads": 4,
}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 256,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "router_aux_loss_coef": 0.01,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_vlm() -> Callable[..., MiniVLM]:
    """make_vlm(architecture, projector, vocab_size, tied) with weights that are large enough to matter."""

    def make(
        architecture: str = "qwen3", projector: str = "mlp2x_gelu", vocab_size: int = 320, tied: bool = True
    ) -> MiniVLM:
        language_model = build_language_model(
            path=None,
            architecture=architecture,
            sizes=SIZES | {"tie_word_embeddings": tied},
            vocab_size=vocab_size,
            seed=0,
        )
        built = build_projector(
            projector, VISION_SIZE, SIZES["hidden_size"], num_features=NUM_IMAGE_TOKENS, sizes=PROJECTOR_SIZES
        )
        vlm = MiniVLM(built, language_model, IMAGE_TOKEN)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in vlm.language_model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.1, generator=generator)
        return vlm.eval()

    return make


Segment = tuple[list[int], list[int], Tensor]


@pytest.fixture
def make_segment() -> Callable[..., Segment]:
    """make_segment(seed, num_prompt, num_answer, num_pictures, tokens) -> ids, labels, features [n, P, D_vision]."""

    def make(
        seed: int, num_prompt: int = 4, num_answer: int = 3, num_pictures: int = 1, tokens: int = NUM_IMAGE_TOKENS
    ) -> Segment:
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(4, 320, (num_prompt + num_answer,), generator=generator).tolist()
        ids = text[:1] + [IMAGE_TOKEN] * (tokens * num_pictures) + text[1:]
        labels = [-100] * (len(ids) - num_answer) + ids[len(ids) - num_answer :] if num_answer else [-100] * len(ids)
        features = torch.randn(num_pictures, NUM_IMAGE_TOKENS, VISION_SIZE, generator=generator)
        return ids, labels, features.bfloat16()

    return make


@pytest.fixture
def make_batch() -> Callable[..., dict[str, Tensor]]:
    """make_batch(rows of segments, length): pack the segments of each row and pad it."""

    def make(rows: list[list[Segment]], length: int | None = None) -> dict[str, Tensor]:
        length = length or max(sum(len(ids) for ids, _, _ in row) for row in rows)
        names = ("input_ids", "labels", "position_ids", "segment_ids")
        batch = {name: torch.zeros(len(rows), length, dtype=torch.int64) for name in names}
        batch["labels"].fill_(-100)
        features, number = [torch.zeros(0, NUM_IMAGE_TOKENS, VISION_SIZE, dtype=torch.bfloat16)], 0
        for row_index, row in enumerate(rows):
            start = 0
            for ids, labels, pictures in row:
                number += 1
                place = slice(start, start + len(ids))
                batch["input_ids"][row_index, place] = torch.tensor(ids)
                batch["labels"][row_index, place] = torch.tensor(labels)
                batch["position_ids"][row_index, place] = torch.arange(len(ids))
                batch["segment_ids"][row_index, place] = number
                features.append(pictures)
                start += len(ids)
        batch["image_features"] = torch.cat(features)
        batch["image_index"] = torch.arange(len(batch["image_features"]))
        return batch

    return make


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random CLIP: 32 px, patches of 16 px, so 5 image tokens of width 32."""
    model = build_clip(
        image_size=32,
        patch_size=16,
        vision_hidden_size=VISION_SIZE,
        vision_layers=2,
        vision_heads=2,
        text_hidden_size=16,
        text_layers=1,
        text_heads=1,
        max_text_tokens=8,
        projection_dim=16,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
        seed=0,
    )
    folder = tmp_path_factory.mktemp("clip")
    save_clip(model, folder)
    return str(folder)


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random whole SigLIP: 32 px, patches of 16 px, no class token, so 4 features of width 32."""
    sizes = {"hidden_size": VISION_SIZE, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiglipModel(
            SiglipConfig(
                vision_config={**sizes, "image_size": 32, "patch_size": 16},
                text_config={**sizes, "vocab_size": 64, "max_position_embeddings": 8},
            )
        )
        for name, parameter in model.named_parameters():  # norms that do something
            if "layernorm" in name or "layer_norm" in name:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    folder = tmp_path_factory.mktemp("siglip")
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a red circle left of a blue square", "what colour is it?", "多少个圆"] * 3, 320, folder)
    return folder


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Eight coloured pictures of different shapes and sizes."""
    generator = np.random.default_rng(0)
    shapes = [(32, 32), (64, 48), (40, 90), (33, 31), (100, 100), (16, 20), (70, 35), (48, 48)]
    return [Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8), "RGB") for shape in shapes]
