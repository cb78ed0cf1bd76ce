"""A complete export with random weights: tower, projector, language model, tokenizer. Built in about a second."""

import base64
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from minivlm.data.tokenizer import train_tokenizer
from minivlm.model.clip import build_clip, save_clip
from minivlm.model.export import save_export
from minivlm.model.language import build_language_model
from minivlm.model.projector import build_projector
from minivlm.model.vlm import MiniVLM

IMAGE_SIDE, PATCH_SIDE, WIDTH, CONTEXT = 32, 16, 32, 256
NUM_IMAGE_TOKENS = (IMAGE_SIDE // PATCH_SIDE) ** 2 + 1
PROJECTOR_SIZES = {"pixel_shuffle_factor": 2, "resampler_queries": 3, "resampler_layers": 1, "resampler_heads": 2}
CORPUS = ["a red circle and a blue square", "How many shapes are there?", "红色的圆在左边", "yes no one two three"]
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 64,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
    "max_position_embeddings": CONTEXT,
}


def build_export(folder: Path, projector: str = "mlp2x_gelu") -> Path:
    """Write everything below `folder`; returns the export's directory."""
    tokenizer = train_tokenizer(CORPUS, 320, folder / "tokenizer")
    clip = build_clip(
        image_size=IMAGE_SIDE,
        patch_size=PATCH_SIDE,
        vision_hidden_size=WIDTH,
        vision_layers=1,
        vision_heads=1,
        text_hidden_size=WIDTH,
        text_layers=1,
        text_heads=1,
        max_text_tokens=16,
        projection_dim=16,
        vocab_size=len(tokenizer),
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
        seed=0,
    )
    save_clip(clip, folder / "clip")
    language_model = build_language_model(
        path=None, architecture="qwen3", sizes=SIZES, vocab_size=len(tokenizer), seed=0
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # logits far enough apart that answers differ, and depend on the picture
        for parameter in language_model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3, generator=generator)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    built = build_projector(projector, WIDTH, WIDTH, num_features=NUM_IMAGE_TOKENS, sizes=PROJECTOR_SIZES)
    vlm = MiniVLM(built, language_model, image_token_id)
    save_export(folder / "export", vlm, tower_path=str(folder / "clip"), tokenizer_dir=folder / "tokenizer")
    return folder / "export"


def png(color: str = "red", size: tuple[int, int] = (40, 30)) -> bytes:
    """An encoded picture of one colour."""
    buffer = BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(picture: bytes, kind: str = "image/png") -> str:
    """The picture as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"
