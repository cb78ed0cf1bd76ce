"""What scores rows: a row group of validated rows -> how well the answers of each row fit its pictures, by a CLIP.

Cache: FINGERPRINT/NAME.npy, (key, score) of rows; a key hashes pictures and text. Needs no cluster:
`minivlm.data.scores` runs `Scorer` in actors.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from minivlm.data.errors import DataError
from minivlm.data.images import ImageLimits, read_validated_image
from minivlm.storage import write_bytes

if TYPE_CHECKING:
    from minivlm.model.clip_score import ClipScorer

_ENTRY = np.dtype([("key", "<u8"), ("score", "<f4")])


@dataclass(frozen=True)
class Scoring:
    """The CLIP that scores, what each actor reserves, and where scores are kept."""

    path: str
    tokenizer_path: str | None
    precision: str
    batch_size: int
    num_actors: int
    cpus: float
    gpus: float
    threads: int
    store: Path
    limits: ImageLimits

    def load(self, device: str) -> "ClipScorer":
        """The CLIP on a device."""
        from minivlm.model.clip_score import ClipScorer  # seconds of imports, which only this call needs

        return ClipScorer.load(
            self.path, self.tokenizer_path, precision=self.precision, batch_size=self.batch_size, device=device
        )


@dataclass(frozen=True)
class Wanted:
    """Training rows of these sources of a stage, in a file of validated rows."""

    file: Path
    stage: str
    places: tuple[int, ...]

    @property
    def columns(self) -> list[str]:
        """What is read of a row group."""
        texts = ["chosen"] if self.stage == "mpo" else ["messages", "stage", "split"]
        return ["images", "image_sha256", "source", *texts]

    def takes(self, row: dict[str, Any]) -> bool:
        """Whether a row is one of them and has pictures."""
        is_trained = self.stage == "mpo" or (row["stage"], row["split"]) == (self.stage, "train")
        return is_trained and row["source"] in self.places and bool(row["images"])

    def text(self, row: dict[str, Any]) -> str:
        """What is compared with the pictures: the answers."""
        if self.stage == "mpo":
            return str(row["chosen"])
        return " ".join(turn["content"] for turn in row["messages"] if turn["role"] == "assistant")


class Scorer:
    """Ray Data UDF: {group} -> {group, scores (float32 of each of its rows), error}."""

    def __init__(self, wanted: Wanted, scoring: Scoring, fingerprint: str) -> None:
        import torch  # as in `load`

        torch.set_num_threads(scoring.threads)
        self._wanted, self._scoring = wanted, scoring
        self._clip = scoring.load("cuda" if scoring.gpus else "cpu")
        if self._clip.fingerprint != fingerprint:
            raise DataError(f"the CLIP at {scoring.path} changed while it was in use. Run the prepare job again")
        self._cache = ScoreCache(scoring.store / fingerprint)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Score the wanted rows of one row group."""
        (group,) = batch["group"].tolist()
        with pq.ParquetFile(self._wanted.file) as file:
            rows = file.read_row_group(group, columns=self._wanted.columns).to_pylist()
        scores = np.full(len(rows), np.nan, np.float32)
        places = np.array([place for place, row in enumerate(rows) if self._wanted.takes(row)], np.int64)
        texts = [self._wanted.text(rows[place]) for place in places]
        keys = np.array([_key(rows[i]["image_sha256"], text) for i, text in zip(places, texts, strict=True)], np.uint64)
        known = self._cache.get(keys)
        missing = np.flatnonzero(np.isnan(known))
        try:
            known[missing] = self._score([rows[places[i]] for i in missing], [texts[i] for i in missing])
        except DataError as error:
            return {"group": [group], "scores": [b""], "error": [str(error)]}
        self._cache.append(keys[missing], known[missing])
        scores[places] = known
        return {"group": [group], "scores": [scores.tobytes()], "error": [""]}

    def _score(self, rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> np.ndarray:
        paths = {digest: path for row in rows for digest, path in zip(row["image_sha256"], row["images"], strict=True)}
        limits = self._scoring.limits
        images = self._embed(
            list(paths),
            lambda part: self._clip.embed_images([read_validated_image(Path(paths[d]), d, limits) for d in part]),
        )
        words = self._embed(list(dict.fromkeys(texts)), self._clip.embed_texts)
        pairs = zip(rows, texts, strict=True)
        return np.array(
            [np.mean([images[digest] @ words[text] for digest in row["image_sha256"]]) for row, text in pairs],
            np.float32,
        )

    def _embed(self, items: list[str], embed: Any) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        size = self._scoring.batch_size
        for part in (items[start : start + size] for start in range(0, len(items), size)):
            found |= dict(zip(part, embed(part).numpy(), strict=True))
        return found


class ScoreCache:
    """Scores of one CLIP on disk, by key. What others append meanwhile is seen by those who open it later."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        parts = [np.load(path) for path in sorted(directory.glob("*.npy"))]
        entries = np.concatenate([np.zeros(0, _ENTRY), *parts])
        self._entries = entries[np.argsort(entries["key"], kind="stable")]

    def get(self, keys: np.ndarray) -> np.ndarray:
        """float32 of each uint64 key, NaN where there is none."""
        places = np.searchsorted(self._entries["key"], keys)
        found = np.full(len(keys), np.nan, np.float32)
        inside = np.flatnonzero(places < len(self._entries))
        same = inside[self._entries["key"][places[inside]] == keys[inside]]
        found[same] = self._entries["score"][places[same]]
        return found

    def append(self, keys: np.ndarray, scores: np.ndarray) -> None:
        """Commit scores as one file."""
        if not len(keys):
            return
        entries = np.empty(len(keys), _ENTRY)
        entries["key"], entries["score"] = keys, scores
        buffer = BytesIO()
        np.save(buffer, entries)
        data = buffer.getvalue()
        write_bytes(self._directory / f"{hashlib.sha256(data).hexdigest()[:20]}.npy", data)


def _key(digests: Sequence[str], text: str) -> int:
    joined = "\n".join([*digests, text])
    return int.from_bytes(hashlib.blake2b(joined.encode(), digest_size=8).digest(), "little")
