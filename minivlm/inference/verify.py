"""Check that an export means the same to plain transformers as to this project. Called by `jobs.export --verify`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from minivlm.data.chat import encode_prompt
from minivlm.model.checkpoint import CheckpointError
from minivlm.model.export import load_export, load_export_tower
from minivlm.model.generate import Prompt, generate
from minivlm.schema import IMAGE_PLACEHOLDER, Message

TOLERANCE = 1e-5
"""Largest difference of a logit, in float32."""

MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Verified:
    """What was compared."""

    num_pictures: int
    max_logit_difference: float


@torch.inference_mode()
def verify_export(folder: Path, asked: Sequence[tuple[Image.Image, str]]) -> Verified:
    """Ask the export through transformers' own classes and through ours; both read the folder and nothing else.

    Args:
        asked: pictures and questions without placeholders.

    Raises:
        CheckpointError: prompts or greedy texts differ, or logits by more than TOLERANCE.
    """
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    ours, tower = load_export(folder), load_export_tower(folder, batch_size=len(asked))
    ours.vlm.eval()
    features = tower.encode_exact(tower.preprocess([picture for picture, _ in asked]))
    largest = 0.0
    for number, ((picture, question), feature) in enumerate(zip(asked, features, strict=True), start=1):
        typed = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(typed, add_generation_prompt=True)
        inputs = processor(images=picture, text=text, return_tensors="pt")
        turn = Message("user", f"{IMAGE_PLACEHOLDER}\n{question}")
        ids = encode_prompt(ours.tokenizer, [turn], ours.num_image_tokens, num_images=1)
        if inputs["input_ids"][0].tolist() != ids:
            raise CheckpointError(f"{folder}: transformers reads question {number} as other tokens: {question!r}")
        embeds = ours.vlm.embed(inputs["input_ids"], feature[None], torch.tensor([0]))
        difference = (ours.vlm.language_model(inputs_embeds=embeds).logits - stock(**inputs).logits).abs().max()
        largest = max(largest, float(difference))
        if not largest <= TOLERANCE:
            raise CheckpointError(f"{folder}: logits of question {number} differ by {largest:.2g}: {question!r}")
        eos = int(ours.tokenizer.eos_token_id)
        (answer,) = generate(ours.vlm, [Prompt(ids, feature[None])], max_new_tokens=MAX_NEW_TOKENS, eos_token_id=eos)
        theirs = stock.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0, len(ids) :].tolist()
        theirs = theirs[: theirs.index(eos)] if eos in theirs else theirs
        if theirs != answer:
            raise CheckpointError(
                f"{folder}: transformers answers {processor.decode(theirs)!r} where we answer "
                f"{ours.tokenizer.decode(answer)!r}: {question!r}"
            )
    return Verified(len(asked), largest)
