"""CLIP scores of rows, by actors of Ray Data: how well the answers of a row fit its pictures.

Each actor call reads one row group of the validated rows, scores what the cache lacks, and commits it, so a kill costs
at most the groups in the making, and no row's text or picture passes the driver.
"""

import numpy as np
import pyarrow.parquet as pq
import ray

from minivlm.data.errors import DataError
from minivlm.data.scorer import Scorer, Scoring, Wanted
from minivlm.log import Progress


def clip_scores(wanted: Wanted, scoring: Scoring) -> np.ndarray:
    """Mean cosine of the pictures and the answers of each row.

    Returns:
        One float32 for each row of the file, NaN where none was wanted.

    Raises:
        ValueError: no CLIP with a text side.
        DataError: a picture is no longer what it was when the rows were validated.
    """
    fingerprint = scoring.load("cpu").fingerprint
    footer = pq.read_metadata(wanted.file)
    counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    starts = np.cumsum([0, *counts])
    scores = np.full(starts[-1], np.nan, np.float32)
    dataset = ray.data.from_items([{"group": group} for group in range(len(counts))], override_num_blocks=len(counts))
    dataset = dataset.map_batches(
        Scorer,
        fn_constructor_args=(wanted, scoring, fingerprint),
        batch_size=None,
        num_cpus=scoring.cpus,
        num_gpus=scoring.gpus,
        compute=ray.data.ActorPoolStrategy(size=min(scoring.num_actors, len(counts))),
    )
    dataset.context.enable_progress_bars = False
    with Progress(len(scores), "score rows") as progress:
        for row in dataset.iter_rows():
            if row["error"]:
                raise DataError(row["error"])
            found = np.frombuffer(row["scores"], np.float32)
            scores[starts[row["group"]] :][: len(found)] = found
            progress.update(len(found))
    return scores
