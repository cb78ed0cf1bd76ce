"""How well a text fits a picture, by both halves of a CLIP. Called by the actors that score rows.

Every forward has the same batch shape, so that a score depends on its picture and text alone.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Self

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from minivlm.model.tokenizer import END_OF_TEXT, encode_text, load_tokenizer, token_id
from minivlm.model.vision import PRECISIONS


class ClipScorer:
    """A stock `CLIPModel` with its image processor and tokenizer, in evaluation mode."""

    def __init__(
        self,
        model: CLIPModel,
        image_processor: CLIPImageProcessorPil,
        tokenizer: PreTrainedTokenizerFast,
        *,
        marks: tuple[list[int], int],
        precision: str,
        batch_size: int,
        device: str,
    ) -> None:
        """Take the float32 `model` over.

        Args:
            marks: token ids in front of every text, and the one behind it.
        """
        self._processor, self._tokenizer, self._marks = image_processor, tokenizer, marks
        self._batch_size, self._dtype, self._device = batch_size, PRECISIONS[precision], torch.device(device)
        self._max_tokens: int = model.config.text_config.max_position_embeddings
        self.fingerprint = _fingerprint(model, image_processor, tokenizer, [precision, batch_size])
        """16 hex digits of all that determines a score."""
        self._model = model.to(device=self._device, dtype=self._dtype).eval().requires_grad_(False)

    @classmethod
    def load(cls, path: str, tokenizer_path: str | None, *, precision: str, batch_size: int, device: str) -> Self:
        """Read a CLIPModel folder or hub id.

        Args:
            tokenizer_path: of a CLIP trained here, whose texts end with <|endoftext|>; None = the tokenizer beside the
                weights, with its own first and last token.

        Raises:
            ValueError: no CLIP there, no text side, or no tokenizer.
        """
        model, processor = _load_model(path)
        marks: tuple[list[int], int]
        if tokenizer_path is not None:
            tokenizer = load_tokenizer(tokenizer_path)
            marks = ([], token_id(tokenizer, END_OF_TEXT))
        else:
            tokenizer = _load_tokenizer(path, model.config.text_config.vocab_size)
            marks = ([int(tokenizer.bos_token_id)], int(tokenizer.eos_token_id))
        return cls(model, processor, tokenizer, marks=marks, precision=precision, batch_size=batch_size, device=device)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image]) -> Tensor:
        """[N, D] float32 of length 1 on the CPU; one batch at most."""
        pixel_values: Tensor = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        batch = pixel_values.new_zeros(self._batch_size, *pixel_values.shape[1:])
        batch[: len(images)] = pixel_values
        pooled = self._model.vision_model(pixel_values=batch.to(self._device, self._dtype)).pooler_output
        return _unit(self._model.visual_projection(pooled))[: len(images)]

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """As `embed_images`. Texts are cut at the length that the text tower reads."""
        first, last = self._marks
        room = self._max_tokens - len(first) - 1
        ids = torch.full((self._batch_size, self._max_tokens), last)
        for row, text in enumerate(texts):
            tokens = [*first, *encode_text(self._tokenizer, text)[:room]]
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        pooled = self._model.text_model(input_ids=ids.to(self._device)).pooler_output
        return _unit(self._model.text_projection(pooled))[: len(texts)]


def _unit(embeds: Tensor) -> Tensor:
    return normalize(embeds.float().cpu(), dim=-1)


def _load_model(path: str) -> tuple[CLIPModel, CLIPImageProcessorPil]:
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if not isinstance(config, CLIPConfig):
            raise ValueError(f"a {config.model_type} without CLIP's text side")
        model, report = CLIPModel.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        absent = sorted(report["missing_keys"])
        if absent:
            raise ValueError(f"{len(absent)} weights are missing, for example {absent[0]}")
        return model, CLIPImageProcessorPil.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Retrieval and `min_clip_score` cannot be computed with clip.path={path} ({str(error).splitlines()[0]}). "
            "They need a whole CLIPModel: type clip.path=openai/clip-vit-base-patch32, or remove min_clip_score"
        ) from None


def _load_tokenizer(path: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer beside the weights. Where its files are missing transformers makes an all but empty one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
    else:
        ends = isinstance(tokenizer, PreTrainedTokenizerFast) and None not in (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
        )
        if ends and vocab_size // 2 < len(tokenizer) <= vocab_size:
            return tokenizer
        reason = f"{len(tokenizer)} entries for the {vocab_size} of the text side, or no first and last token"
    raise ValueError(
        f"Retrieval and `min_clip_score`: no tokenizer of the text side under `{path}` ({reason}). Put its "
        "tokenizer.json beside the weights, or remove min_clip_score"
    )


def _fingerprint(
    model: CLIPModel, processor: CLIPImageProcessorPil, tokenizer: PreTrainedTokenizerFast, numerics: list[int | str]
) -> str:
    settings = [numerics, processor.to_dict(), tokenizer.backend_tokenizer.to_str()]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
