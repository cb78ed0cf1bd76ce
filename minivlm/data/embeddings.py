"""Pictures and texts -> a CLIP's shared space, by actors of Ray Data. Each content is embedded once per CLIP.

Each actor call embeds one block and commits it, so a kill costs at most the blocks in the making.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray

from minivlm.data.embedder import Embedder, EmbeddingCache
from minivlm.data.scorer import Scoring
from minivlm.data.stream import from_tables
from minivlm.log import Progress


@dataclass(frozen=True)
class Embeddings:
    """[D] float32 of length 1 by key; `errors` says why a picture has none. `computed` were not in the cache."""

    images: dict[str, np.ndarray]
    texts: dict[str, np.ndarray]
    errors: dict[str, str]
    computed: int


def embed(images: Mapping[str, str], texts: Mapping[str, str], scoring: Scoring, fingerprint: str) -> Embeddings:
    """Embed what the cache lacks.

    Args:
        images: path by sha256 of the file's bytes.
        texts: text by its sha256.
        scoring: the CLIP, its placement, and where embeddings are kept (`store`).
        fingerprint: of that CLIP.

    Raises:
        DataError: the CLIP was exchanged meanwhile.
    """
    wanted = {"image": images, "text": texts}
    blocks, errors, computed = [], {}, 0
    for kind, items in wanted.items():
        cache = EmbeddingCache(scoring.store / fingerprint / kind)
        missing = [key for key in items if cache.get(key) is None]
        computed += len(missing)
        rows = [{"kind": kind, "key": key, "value": items[key]} for key in missing]
        blocks += [rows[start : start + scoring.batch_size] for start in range(0, len(rows), scoring.batch_size)]
    if blocks:
        errors = _run(blocks, computed, scoring, fingerprint)
    caches = {kind: EmbeddingCache(scoring.store / fingerprint / kind) for kind in wanted}
    found = {
        kind: {key: row for key in items if (row := caches[kind].get(key)) is not None}
        for kind, items in wanted.items()
    }
    return Embeddings(found["image"], found["text"], errors, computed)


def _run(blocks: list[list[dict[str, str]]], total: int, scoring: Scoring, fingerprint: str) -> dict[str, str]:
    """Why pictures could not be embedded, by key."""
    dataset = from_tables([pa.Table.from_pylist(block) for block in blocks]).map_batches(
        Embedder,
        fn_constructor_args=(scoring, fingerprint),
        batch_size=None,
        num_cpus=scoring.cpus,
        num_gpus=scoring.gpus,
        compute=ray.data.ActorPoolStrategy(size=min(scoring.num_actors, len(blocks))),
    )
    dataset.context.enable_progress_bars = False
    errors = {}
    with Progress(total, "embed") as progress:
        for row in dataset.iter_rows():
            if row["error"]:
                errors[row["key"]] = row["error"]
            progress.update(1)
    return errors
