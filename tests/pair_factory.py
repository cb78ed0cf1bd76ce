"""Small prepared homes for the preference factory, and a plain function in place of its model."""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from minivlm.config import Config
from minivlm.config.model import ClipConfig
from minivlm.config.preferences import PreferencesConfig
from minivlm.data.samples import SampleWriter, sample_columns
from minivlm.data.tokenizer import encode_text, train_tokenizer
from minivlm.data.tokens import TokenTable
from minivlm.inference.jobs import Answer, Request
from minivlm.layout import pairs_dir, run_dir, samples_dir, tokenizer_dir
from minivlm.model.checkpoint import write_manifest
from minivlm.preferences.reference import add_reference_logps
from minivlm.preferences.sampling import build_pairs
from minivlm.schema import Message, Sample
from minivlm.storage import write_json

ASK = "<image>\nHow many?\nAnswer the question using a single word or phrase."
TELL = "<image>\nDescribe the image."
SEEN, BLIND = "a red circle and a blue square", "no circle at all in sight"
SETTINGS: dict[str, Any] = {
    "num_samples": 4,
    "max_pairs_per_question": 3,
    "min_pairs": 1,
    "batch_size": 5,
    "max_new_tokens": 200,
}


def sample(number: int, *, task: str = "reasoning", answer: str | None = "3") -> Sample:
    stage, ask = ("prompts", ASK) if task == "reasoning" else ("pretrain", TELL)
    turns = (Message("user", ask), Message("assistant", "3"))
    digest, language = f"{number:064}", "zh" if number == 3 else "en"
    return Sample(f"{task}{number}", (f"/data/{number}.png",), (digest,), turns, stage, "train", task, language, answer)


def make_checkpoint(folder: Path) -> Path:
    """A folder that is an export as far as preferences look at it before a model answers."""
    words = [ASK, TELL, SEEN, BLIND, "Two and one are three.\nSo:\nFinal answer: 3 4 user assistant"]
    train_tokenizer(words, 320, folder / "export")
    write_json(folder / "export" / "config.json", {})
    (folder / "export" / "model.safetensors").write_bytes(b"weights")
    write_manifest(folder, {"stage": "sft", "step": 1})
    return folder


def make_config(root: Path, checkpoint: Path, *, questions: int = 4, captions: int = 3, **settings: Any) -> Config:
    """Questions and captions that are prepared, and a finished SFT run with this checkpoint."""
    preferences = PreferencesConfig(**SETTINGS | settings)
    config = Config(storage_path=root, clip=ClipConfig(image_size_px=16, patch_size_px=8), preferences=preferences)
    rows = [sample(i) for i in range(questions)] + [sample(i, task="caption", answer=None) for i in range(captions)]
    if not samples_dir(config).exists():
        samples_dir(config).mkdir(parents=True)
        with SampleWriter(samples_dir(config)) as writer:
            writer.add(samples=[sample_columns(row, "toy.json", i) for i, row in enumerate(rows)])
        write_json(samples_dir(config) / "summary.json", {"counts": {}, "sources": {}})
        shutil.copytree(checkpoint / "export", tokenizer_dir(config))
    paths = {"checkpoint_dir": str(checkpoint), "export_dir": str(checkpoint / "export")}
    write_json(run_dir(config, "sft") / "result.json", paths)
    return config


class Model:
    """Answers each question right, wrong and without the form in turn, questions by question more often wrong."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, unseen: str = BLIND) -> None:
        self.tokenizer, self.unseen = tokenizer, unseen
        self.asked: Counter[str] = Counter()
        self.blind: list[Request] = []

    def __call__(self, blocks: Sequence[Sequence[Request]]) -> Iterator[list[Answer]]:
        for block in blocks:
            self.asked.update(f"{r.messages[-1].content[:30]} {bool(r.response_prefix)} {r.row_id}" for r in block)
            yield [self._answer(request) for request in block]

    def _answer(self, request: Request) -> Answer:
        question, number = (int(part) for part in request.row_id.partition(":")[2].split("/"))
        if request.response_prefix:
            self.blind.append(request)
            text = ["", " " + self.unseen, SEEN[len(self.tokenizer.decode(request.response_prefix)) :]][question % 3]
        elif "Describe" in request.messages[-1].content:
            text = SEEN
        else:
            verdict = (3, 4, None)[number % 3] if question else 4
            text = f"{number} of them.\nSo:\n" + ("I do not know" if verdict is None else f"Final answer: {verdict}")
        ids = encode_text(self.tokenizer, text) if text else []
        return Answer(request.row_id, text.strip(), tuple(ids))


def score(table: Path) -> list[float]:
    return [-0.5 * entry for entry in range(len(TokenTable.open(table)))]


def run(config: Config, model: Model) -> dict[str, bytes]:
    """Everything that the factory leaves behind."""
    build_pairs(config, model)
    add_reference_logps(config, score)
    folder = pairs_dir(config)
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if not path.name.startswith(".")}


ALL = {"prompt_style": "final_answer", "dropout_ntp_tasks": ("caption",)}
