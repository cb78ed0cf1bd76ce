"""An export that answers conversations with pictures in this process: no cluster, no cache, no settings but its folder.

`minivlm/inference/harness_model.py` puts it behind lmms-eval.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from minivlm.data.chat import encode_prompt, turn_content
from minivlm.model.export import load_export, load_export_tower
from minivlm.model.generate import Prompt, generate
from minivlm.schema import Message


class DirectModel:
    """Language model, projector and tower of one export, in float32."""

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        """Load all parts.

        Raises:
            CheckpointError: no export, or not a complete one.
        """
        self._export = load_export(folder)
        self._export.vlm.to(device).eval()
        self._tower = load_export_tower(folder, batch_size=1, device=device)

    def answer(
        self, asked: Sequence[tuple[Sequence[Message], Sequence[Image.Image]]], *, max_new_tokens: int
    ) -> list[tuple[str, int]]:
        """Answer conversations greedily, in one batch.

        Args:
            asked: turns whose `<image>` placeholders stand for the RGB pictures beside them, in order.

        Returns:
            For each the text and the number of its tokens.

        Raises:
            ValueError: the last turn is not the user's, or placeholders unlike the pictures.
        """
        export, prompts = self._export, []
        for messages, pictures in asked:
            ids = encode_prompt(export.tokenizer, messages, export.num_image_tokens, num_images=len(pictures))
            prompts.append(Prompt(ids, self._tower.encode(self._tower.preprocess(pictures))))
        eos = int(export.tokenizer.eos_token_id)
        answers = generate(export.vlm, prompts, max_new_tokens=max_new_tokens, eos_token_id=eos)
        return [(export.tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids)) for ids in answers]


def read_turns(typed: Sequence[tuple[str, Sequence[str | Image.Image]]]) -> tuple[list[Message], list[Image.Image]]:
    """Turns of text and pictures in any order -> messages with placeholders, and all pictures as RGB.

    As at the HTTP endpoint a turn's pictures come before its text, and a literal `<image>` in a text is no picture.

    Raises:
        ValueError: a picture in an assistant's turn.
    """
    messages, pictures = [], []
    for role, parts in typed:
        own = [part.convert("RGB") for part in parts if not isinstance(part, str)]
        text = "\n".join(part for part in parts if isinstance(part, str))
        if own and role == "assistant":
            raise ValueError("an assistant's turn holds a picture: only the user and the system show pictures")
        messages.append(Message(role, text if role == "assistant" else turn_content(text, len(own))))
        pictures += own
    return messages, pictures
