"""Classes that Ray Data keeps alive in actors: prompts -> answers, and table entries -> log-probabilities.

`inference/jobs.py` builds the jobs around them. A row names the export that it is meant for, so one job can serve
several checkpoints with one start of Python and torch; blocks of one checkpoint stand together, so each is loaded once.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch

from minivlm.data.chat import encode_prompt
from minivlm.data.collate import collate
from minivlm.data.features import FeatureCache
from minivlm.data.tokens import TokenTable
from minivlm.model.export import Export, load_export
from minivlm.model.generate import Prompt, generate
from minivlm.model.vlm import sequence_logps
from minivlm.schema import Message


@dataclass(frozen=True)
class Decoding:
    """How answers are written. Temperature 0 = greedy; top_k 0 = the whole vocabulary."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0


class _Loaded:
    """Holds one export at a time, in evaluation mode on the given device."""

    def __init__(self, device: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.device = device
        self._path: str | None = None
        self._export: Export | None = None

    def get(self, path: str) -> Export:
        if self._export is None or self._path != path:
            self._export = None
            self._export = load_export(Path(path))
            self._export.vlm.to(self.device).eval()
            self._path = path
        return self._export


class Generator:
    """Rows {row_id, export_dir, messages, images, seed, response_prefix} -> {row_id, text, token_ids}.

    messages (turns), images (digests) and response_prefix (token ids that the answer goes on from) are JSON.
    """

    def __init__(self, features_dir: str, decoding: Decoding, device: str, num_threads: int) -> None:
        self._loaded = _Loaded(device, num_threads)
        self._features = FeatureCache.open(Path(features_dir))
        self._decoding = decoding

    def __call__(self, block: pa.Table) -> pa.Table:
        """Answer one block; what a row gets depends on nothing but the row."""
        rows = block.to_pylist()
        answers: list[dict[str, object]] = []
        for path in dict.fromkeys(row["export_dir"] for row in rows):
            answers += self._answer(path, [row for row in rows if row["export_dir"] == path])
        return pa.Table.from_pylist(answers)

    def _answer(self, path: str, rows: list[dict[str, object]]) -> list[dict[str, object]]:
        export = self._loaded.get(path)
        prompts = []
        for row in rows:
            messages = [Message(**turn) for turn in json.loads(str(row["messages"]))]
            digests = json.loads(str(row["images"]))
            ids = encode_prompt(export.tokenizer, messages, export.num_image_tokens, num_images=len(digests))
            ids += json.loads(str(row["response_prefix"]))
            prompts.append(Prompt(ids, self._features.get(digests), row=int(str(row["seed"]))))
        outputs = generate(
            export.vlm,
            prompts,
            max_new_tokens=self._decoding.max_new_tokens,
            eos_token_id=export.tokenizer.eos_token_id,
            temperature=self._decoding.temperature,
            top_k=self._decoding.top_k,
        )
        texts = [export.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in outputs]
        return [
            {"row_id": row["row_id"], "text": text, "token_ids": ids}
            for row, text, ids in zip(rows, texts, outputs, strict=True)
        ]


class LogProbs:
    """Rows {rows: JSON list of lists of table entries} -> {entry, logp}: sums over answer tokens in nats, float32."""

    def __init__(self, features_dir: str, table_dir: str, export_dir: str, device: str, num_threads: int) -> None:
        self._export = _Loaded(device, num_threads).get(export_dir)
        self._device = device
        self._features = FeatureCache.open(Path(features_dir))
        self._table = TokenTable.open(Path(table_dir))

    def __call__(self, block: pa.Table) -> pa.Table:
        """One micro-batch per row."""
        entries: list[int] = []
        logps: list[float] = []
        for text in block["rows"].to_pylist():
            rows = [tuple(row) for row in json.loads(text)]
            batch = collate(
                self._table,
                rows,
                lambda digests: self._features.get(digests),
                image_token_id=self._export.image_token_id,
                pad_token_id=int(self._export.tokenizer.pad_token_id),
            )
            members = [entry for row in rows for entry in row]
            with torch.inference_mode():
                token_logps = self._export.vlm({key: value.to(self._device) for key, value in batch.items()})
                sums = sequence_logps(token_logps, len(members))
            entries += members
            logps += sums.float().tolist()
        return pa.table({"entry": pa.array(entries, pa.int64()), "logp": pa.array(logps, pa.float64())})
