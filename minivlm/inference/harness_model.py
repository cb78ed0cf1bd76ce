"""This project's models inside lmms-eval: the payload of the entry point group `lmms_eval.models`, and its class.

    python -m lmms_eval --model minivlm --model_args pretrained=EXPORT_FOLDER --tasks TASK --batch_size 8

Only lmms-eval imports this module; it is no dependency of ours. docs/evaluation.md says what was run.
Contract: EvolvingLMMs-Lab/lmms-eval 0.7.3, models/registry_v2.py and docs/guides/model_guide.md.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL.Image import Image

from minivlm.inference.direct import DirectModel, read_turns

MODEL_ID = "minivlm"
MAX_NEW_TOKENS = 96
"""Where a task names no limit."""


def manifest() -> ModelManifest:
    """What lmms-eval registers."""
    return ModelManifest(model_id=MODEL_ID, chat_class_path=f"{__name__}.{HarnessModel.__name__}")


class HarnessModel(lmms):
    """A chat model of lmms-eval. Answers are greedy; stop strings of a task (`until`) cut them."""

    is_simple = False

    def __init__(self, pretrained: str, device: str = "cpu", batch_size: int = 1, max_batch_size: None = None) -> None:
        """Load an export folder.

        Args:
            pretrained: the folder.
            device: a torch device.
            batch_size: conversations decoded together. lmms-eval also names `max_batch_size`, which means nothing here.
        """
        super().__init__()
        self._model = DirectModel(Path(pretrained), device=device)
        self._batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer every request, in order.

        Raises:
            ValueError: a task that samples, or shows a video or a sound.
        """
        by_limit: defaultdict[int, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            by_limit[_limit(request)].append(index)
        results: dict[int, GenerationResult] = {}
        for limit, indices in by_limit.items():
            for start in range(0, len(indices), self._batch_size):
                batch = indices[start : start + self._batch_size]
                results |= zip(batch, self._answer([requests[index] for index in batch], limit), strict=True)
        return [results[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """lmms-eval asks chat models for generated text only (its ConfigurableMessagesTask)."""
        raise NotImplementedError("minivlm is a chat model of lmms-eval: choose tasks of output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("minivlm answers one round per question: choose tasks of output_type generate_until")

    def _answer(self, requests: Sequence[Instance], limit: int) -> list[GenerationResult]:
        asked, stops = [], []
        for request in requests:
            _, doc_to_messages, generation, doc_id, task, split = request.args
            asked.append(read_turns(_typed(doc_to_messages(self.task_dict[task][split][doc_id]))))
            until = generation.get("until") or []
            stops.append([until] if isinstance(until, str) else until)
        results = []
        for (text, num_tokens), own in zip(self._model.answer(asked, max_new_tokens=limit), stops, strict=True):
            cut = min((place for stop in own if stop and (place := text.find(stop)) >= 0), default=len(text))
            results.append(GenerationResult(text[:cut], TokenCounts(output_tokens=num_tokens)))
        return results


def _typed(messages: Sequence[dict[str, Any]]) -> list[tuple[str, list[str | Image]]]:
    turns = []
    for message in messages:
        parts: list[str | Image] = []
        for part in message["content"]:
            shown = part["text"] if part["type"] == "text" else part["url"]
            if part["type"] not in ("text", "image") or (part["type"] == "image" and not isinstance(shown, Image)):
                raise ValueError(
                    f"a message shows a {part['type']} as {type(shown).__name__}: minivlm reads PIL pictures"
                )
            parts.append(shown)
        turns.append((message["role"], parts))
    return turns


def _limit(request: Instance) -> int:
    _, _, generation, _, task, _ = request.args
    if generation.get("do_sample") or (generation.get("temperature") or 0) > 0:
        raise ValueError(f"task {task} samples its answers: minivlm answers greedily here. Set temperature to 0")
    return int(generation.get("max_new_tokens") or MAX_NEW_TOKENS)
