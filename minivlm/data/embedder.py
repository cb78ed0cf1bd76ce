"""What embeds pictures and texts with a CLIP, and the cache by content. Needs no cluster.

Cache: FINGERPRINT/image/NAME.npy and FINGERPRINT/text/NAME.npy, (sha256, embedding) of rows. `minivlm.data.embeddings`
runs `Embedder` in actors.
"""

import hashlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from minivlm.data.errors import DataError
from minivlm.data.images import BadImage, read_image
from minivlm.data.scorer import Scoring
from minivlm.storage import write_bytes


class EmbeddingCache:
    """Embeddings of one kind by one CLIP, by sha256 of the content. Those who open it later see what others commit."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._found: dict[str, np.ndarray] = {}
        for path in sorted(directory.glob("*.npy")):
            part = np.load(path)
            self._found |= dict(zip(part["key"].astype(str).tolist(), part["embedding"], strict=True))

    def get(self, key: str) -> np.ndarray | None:
        """[D] float32 of length 1, None where there is none."""
        return self._found.get(key)


def commit_embeddings(directory: Path, keys: Sequence[str], embeddings: np.ndarray) -> None:
    """Add embeddings [N, D], N > 0, to the cache of a directory, as one file."""
    entries = np.empty(len(keys), np.dtype([("key", "S64"), ("embedding", "<f4", (embeddings.shape[1],))]))
    entries["key"], entries["embedding"] = keys, embeddings
    buffer = BytesIO()
    np.save(buffer, entries)
    data = buffer.getvalue()
    write_bytes(directory / f"{hashlib.sha256(data).hexdigest()[:20]}.npy", data)


class Embedder:
    """Ray Data UDF: {kind, key, value} -> {kind, key, error}; the embeddings go to the cache.

    `kind` is image (`value` a path, `key` the sha256 of its bytes) or text (`key` the sha256 of the text), one for all
    rows of a block. `error` says why a picture has no embedding.
    """

    def __init__(self, scoring: Scoring, fingerprint: str) -> None:
        import torch  # seconds of imports, which only the actors need

        torch.set_num_threads(scoring.threads)
        self._scoring = scoring
        self._clip = scoring.load("cuda" if scoring.gpus else "cpu")
        if self._clip.fingerprint != fingerprint:
            raise DataError(f"the CLIP at {scoring.path} changed while it was in use. Type the same command again")
        self._store = scoring.store / fingerprint

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Embed one block of at most `scoring.batch_size` rows."""
        keys, values, kind = batch["key"].tolist(), batch["value"].tolist(), str(batch["kind"][0])
        errors = [""] * len(keys)
        if kind == "text":
            commit_embeddings(self._store / kind, keys, self._clip.embed_texts(values).numpy())
        else:
            images = []
            for place, (key, value) in enumerate(zip(keys, values, strict=True)):
                try:
                    image, found = read_image(Path(value), self._scoring.limits)
                    if found != key:
                        raise BadImage("changed while it was read")
                    images.append(image)
                except BadImage as error:
                    errors[place] = str(error)
            good = [key for key, error in zip(keys, errors, strict=True) if not error]
            if good:
                commit_embeddings(self._store / kind, good, self._clip.embed_images(images).numpy())
        return {"kind": [kind] * len(keys), "key": keys, "error": errors}
