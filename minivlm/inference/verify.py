"""Check that an export means the same to plain transformers as to this project. Called by `jobs.export --verify`.

An export whose projector stock LLaVA has not is refused by transformers. There our own two ways to an answer must
agree: over cached features in a batch, as evaluation goes, and from one picture alone, as serving goes.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from minivlm.data.chat import encode_prompt
from minivlm.data.features import FeatureCache
from minivlm.model.checkpoint import CheckpointError
from minivlm.model.export import Export, load_export, load_export_tower
from minivlm.model.generate import Prompt, generate, stream_generate
from minivlm.model.llava import read_llava_config
from minivlm.model.vision import VisionTower
from minivlm.schema import IMAGE_PLACEHOLDER, Message

TOLERANCE = 1e-5
"""Largest difference of a logit, in float32."""

MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Verified:
    """What was compared."""

    num_pictures: int
    max_logit_difference: float
    is_stock: bool
    """True: with plain transformers. False: our two ways with each other: plain transformers refuses the folder."""


class _Transformers:
    """The export as plain transformers reads it."""

    says = "transformers answers"

    def __init__(self, folder: Path, processor: ProcessorMixin) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ).eval()
        self.image_processor = processor.image_processor

    def logits(self, ids: list[int], picture: Image.Image) -> Tensor:
        pixel_values = self.image_processor(images=picture, return_tensors="pt")["pixel_values"]
        return torch.as_tensor(self.model(input_ids=torch.tensor([ids]), pixel_values=pixel_values).logits)

    def answer(self, ids: list[int], picture: Image.Image) -> list[int]:
        pixel_values = self.image_processor(images=picture, return_tensors="pt")["pixel_values"]
        inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixel_values}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        written = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0, len(ids) :]
        return [int(token) for token in written]


class _FromPicture:
    """The export as our server reads it: one picture, encoded alone."""

    says = "from the picture itself the answer is"

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.export, self.tower = load_export(folder), load_export_tower(folder, batch_size=batch_size)

    def logits(self, ids: list[int], picture: Image.Image) -> Tensor:
        return _logits(self.export, ids, self.tower.encode(self.tower.preprocess([picture])))

    def answer(self, ids: list[int], picture: Image.Image) -> list[int]:
        prompt = Prompt(ids, self.tower.encode(self.tower.preprocess([picture])))
        eos = int(self.export.tokenizer.eos_token_id)
        return list(stream_generate(self.export.vlm, prompt, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=eos))


@torch.inference_mode()
def verify_export(folder: Path, asked: Sequence[tuple[Image.Image, str]]) -> Verified:
    """Ask the export through transformers' own classes (where they can, else from the picture) and through ours.

    All read the folder and nothing else.

    Args:
        asked: pictures and questions without placeholders.

    Raises:
        CheckpointError: prompts or greedy texts differ, logits by more than TOLERANCE, or transformers loads what it
            cannot express.
    """
    _, is_stock = read_llava_config(folder)
    ours, tower = load_export(folder), load_export_tower(folder, batch_size=len(asked))
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    pictures = [row[0] for row in asked]
    other: _Transformers | _FromPicture
    if is_stock:
        other, features = _Transformers(folder, processor), tower.encode_exact(tower.preprocess(pictures))
    else:
        _check_refused(folder)
        other, features = _FromPicture(folder, len(asked)), _from_cache(tower, pictures)
    all_ids = [_prompt_ids(folder, processor, ours, *row) for row in asked]
    prompts = [Prompt(ids, feature[None]) for ids, feature in zip(all_ids, features, strict=True)]
    eos = int(ours.tokenizer.eos_token_id)
    answers = generate(ours.vlm, prompts, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=eos)
    largest = 0.0
    for (picture, question), prompt, answer in zip(asked, prompts, answers, strict=True):
        logits = _logits(ours, prompt.input_ids, prompt.image_features)
        difference = float((logits - other.logits(prompt.input_ids, picture)).abs().max())
        if not difference <= TOLERANCE:  # nor where it is no number
            raise CheckpointError(f"{folder}: logits differ by {difference:.2g}: {question!r}")
        largest = max(largest, difference)
        theirs = other.answer(prompt.input_ids, picture)
        theirs = theirs[: theirs.index(eos)] if eos in theirs else theirs
        if theirs != answer:
            raise CheckpointError(
                f"{folder}: {other.says} {ours.tokenizer.decode(theirs)!r} where we answer "
                f"{ours.tokenizer.decode(answer)!r}: {question!r}"
            )
    return Verified(len(asked), largest, is_stock)


def _prompt_ids(
    folder: Path, processor: ProcessorMixin, ours: Export, picture: Image.Image, question: str
) -> list[int]:
    """The question as token ids, after a look at how the stock processor of the folder writes them."""
    typed = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(typed, add_generation_prompt=True)
    theirs = processor(images=picture, text=text, return_tensors="pt")["input_ids"][0].tolist()
    turn = Message("user", f"{IMAGE_PLACEHOLDER}\n{question}")
    ids = encode_prompt(ours.tokenizer, [turn], ours.num_image_tokens, num_images=1)
    if theirs != ids:
        raise CheckpointError(f"{folder}: transformers reads a question as other tokens: {question!r}")
    return ids


def _check_refused(folder: Path) -> None:
    """transformers must stop at a projector that it has not, or people would get random weights."""
    try:
        AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ValueError:
        return
    raise CheckpointError(f"{folder}: transformers loads it, though LLaVA has no such projector. Export it again")


def _from_cache(tower: VisionTower, pictures: Sequence[Image.Image]) -> Tensor:
    """Features as training and evaluation read them: encoded together, stored, read back."""
    digests = [f"{number:064x}" for number in range(len(pictures))]
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder), tower.fingerprint, (tower.num_features, tower.hidden_size))
        cache.append(digests, tower.encode(tower.preprocess(pictures)))
        return cache.get(digests)


def _logits(export: Export, ids: list[int], image_features: Tensor) -> Tensor:
    embeds = export.vlm.embed(torch.tensor([ids]), image_features, torch.tensor([0]))
    return torch.as_tensor(export.vlm.language_model(inputs_embeds=embeds).logits)
