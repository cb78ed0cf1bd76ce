"""Which validated rows a stage trains on: their numbers from the parquet files, the draw, and the drawn rows.

    samples-H/STAGE-H/drawn/copies.npy      how often each row of samples.parquet (mpo: pairs.parquet) is drawn, uint16
    samples-H/STAGE-H/drawn/mixture.json  rows, reasons, draws and shares by source and by task

Called by `minivlm.data.pipeline`. Memory: about 60 bytes a row and 250 while it is drawn, 900 where near duplicates are
looked for.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from minivlm.data.duplicates import decode_signatures
from minivlm.data.errors import DataError
from minivlm.data.mixture import Rows, SourceRule, StageRule, draw
from minivlm.data.mixture_table import RatingCounts, mixture_report
from minivlm.data.ratings import keep_answers, passing_answers
from minivlm.data.samples import LoadedSample, iter_drawn, load_pairs, read_batches
from minivlm.schema import PreferencePair
from minivlm.storage import new_directory, write_json

REPORT_FILE = "mixture.json"
_LIGHT = ["file", "row", "task", "source", "repeat"]
_KEYS = ["picture_key", "question_key", "whole_key"]


def draw_stage(
    folder: Path,
    target: Path,
    stage: str,
    sources: Sequence[SourceRule],
    rule: StageRule,
    clip_scores: np.ndarray | None,
) -> dict[str, Any]:
    """Draw the training rows of a stage, write what came out to `target`, and return what mixture.json says.

    Args:
        folder: validated rows.
        clip_scores: of each row of the stage's parquet file, NaN where there is none; None = no source asks for them.

    Raises:
        DataError: settings leave no row of a source or of the stage, or name a rating column that no row has.
    """
    gathered = _Gathered(stage, sources, rule, clip_scores)
    num_rows = gathered.read_own(folder)
    if rule.duplicates != "keep":
        gathered.read_held_out(folder)
    rows, places = gathered.joined()
    drawn = draw(rows, list(gathered.files), sources, rule)
    copies = np.zeros(num_rows, np.uint16)
    mine = ~rows.is_held_out
    copies[places[mine]] = drawn.copies[mine]
    validated = json.loads((folder / "summary.json").read_text())["sources"]
    report = mixture_report(stage, rows, drawn, sources, rule, list(gathered.tasks), gathered.ratings, validated)
    with new_directory(target) as temporary:
        np.save(temporary / "copies.npy", copies)
        write_json(temporary / REPORT_FILE, report)
    return report


def drawn_samples(
    folder: Path, target: Path, sources: Sequence[SourceRule], *, once: bool = False
) -> Iterator[LoadedSample]:
    """The drawn rows of a stage in file order, without answers that are rated low.

    Args:
        folder, target, sources: as `draw_stage` had them.
        once: each row one time; else repeated ones come one after another.
    """
    thresholds = [[least for _, least in source.min_rating] for source in sources]
    copies = np.load(target / "copies.npy")
    for (sample, file, row), drawing in iter_drawn(folder, np.minimum(copies, 1) if once else copies):
        passes = passing_answers(drawing.ratings, thresholds[drawing.source]) if drawing.ratings else None
        yield (sample if passes is None else keep_answers(sample, passes)), file, row


def drawn_pairs(folder: Path, target: Path) -> list[PreferencePair]:
    """The drawn pairs of data.mpo in file order."""
    return load_pairs(folder, np.load(target / "copies.npy"))


def pictures_in_use(folder: Path, targets: Mapping[str, Path]) -> set[str]:
    """Digests of the pictures of rows that stages drew, and of all val and test rows.

    Args:
        folder: validated rows.
        targets: what `draw_stage` wrote for each stage that has rows.
    """
    digests: set[str] = set()
    copies = {stage: np.load(target / "copies.npy") for stage, target in targets.items()}
    drawn = [counts for stage, counts in copies.items() if stage != "mpo"]
    first = 0
    for batch in read_batches(folder / "samples.parquet", ["image_sha256", "split"]):
        mask = ~_equal(batch, "split", "train")
        for counts in drawn:
            mask |= counts[first : first + len(batch)] > 0
        digests.update(batch.filter(pa.array(mask))["image_sha256"].flatten().to_pylist())
        first += len(batch)
    first = 0
    for batch in read_batches(folder / "pairs.parquet", ["image_sha256"]) if "mpo" in copies else ():
        mask = copies["mpo"][first : first + len(batch)] > 0
        digests.update(batch.filter(pa.array(mask))["image_sha256"].flatten().to_pylist())
        first += len(batch)
    return digests


class _Gathered:
    """The numbers of rows, batch by batch."""

    def __init__(
        self, stage: str, sources: Sequence[SourceRule], rule: StageRule, clip_scores: np.ndarray | None
    ) -> None:
        self.files: dict[str, int] = {}
        self.tasks: dict[str, int] = {}
        self.ratings = [RatingCounts(dict.fromkeys(dict(source.min_rating), 0)) for source in sources]
        self._stage, self._sources, self._scores = stage, sources, clip_scores
        self._columns = list(_LIGHT)
        if rule.duplicates != "keep" or rule.max_rows_per_picture is not None:
            self._columns += _KEYS
        if rule.duplicates == "drop_near":
            self._columns.append("signature")
        self._chunks: list[Rows] = []
        self._places: list[np.ndarray] = []

    def read_own(self, folder: Path) -> int:
        """Training rows of the stage; returns how many rows their file has."""
        columns = [*self._columns, "ratings"] if any(source.min_rating for source in self._sources) else self._columns
        first = 0
        if self._stage == "mpo":
            batches = ((batch, np.ones(len(batch), bool)) for batch in read_batches(folder / "pairs.parquet", columns))
        else:
            batches = (
                (batch, _equal(batch, "stage", self._stage) & _equal(batch, "split", "train"))
                for batch in read_batches(folder / "samples.parquet", [*columns, "stage", "split"])
            )
        for batch, mask in batches:
            self._add(batch, mask, first)
            first += len(batch)
        return first

    def read_held_out(self, folder: Path) -> None:
        """Val and test rows of every stage."""
        for batch in read_batches(folder / "samples.parquet", [*self._columns, "split"]):
            self._add(batch, _equal(batch, "split", "val") | _equal(batch, "split", "test"), None)

    def joined(self) -> tuple[Rows, np.ndarray]:
        """All rows, and the place of each in its file."""
        if not self._chunks:
            raise DataError(f"No row of {self._stage} was validated. Look at data.{self._stage}")
        return Rows.join(self._chunks), np.concatenate(self._places)

    def _add(self, batch: pa.RecordBatch, mask: np.ndarray, first: int | None) -> None:
        """`first` is the place of the batch in its file; None = held-out rows."""
        places = np.flatnonzero(mask)
        batch = batch.filter(pa.array(mask))
        count = len(batch)
        keys = [_column(batch, name, np.int64).view(np.uint64) for name in _KEYS]
        signatures = np.zeros((count, 0), np.uint8)
        if "signature" in self._columns:
            signatures = decode_signatures(batch["signature"].to_pylist())
        is_held_out = first is None
        none = np.zeros(count, np.int32)
        self._places.append(places + (first or 0))
        self._chunks.append(
            Rows(
                source=none if is_held_out else _column(batch, "source", np.int32),
                file=_codes(batch, "file", self.files),
                row=_column(batch, "row", np.int64),
                task=none if is_held_out else _codes(batch, "task", self.tasks),
                repeat=_column(batch, "repeat", np.float64),
                pictures=keys[0],
                question=keys[1],
                whole=keys[2],
                is_held_out=np.full(count, is_held_out),
                is_low_rated=np.zeros(count, bool) if is_held_out else self._low_rated(batch),
                clip_score=np.full(count, np.nan, np.float32)
                if is_held_out or self._scores is None
                else self._scores[places + (first or 0)],
                signatures=signatures,
            )
        )

    def _low_rated(self, batch: pa.RecordBatch) -> np.ndarray:
        """Rows without any answer that passes; what the ratings say is counted."""
        is_low = np.zeros(len(batch), bool)
        if "ratings" not in batch.schema.names:
            return is_low
        for place, (source, ratings) in enumerate(
            zip(batch["source"].to_pylist(), batch["ratings"].to_pylist(), strict=True)
        ):
            if ratings:
                rules, counts = self._sources[source].min_rating, self.ratings[source]
                for (column, _), values in zip(rules, ratings, strict=True):
                    counts.rated[column] += values is not None
                passes = passing_answers(ratings, [least for _, least in rules])
                is_low[place] = passes is not None and not any(passes)
                counts.low_answers += 0 if passes is None or is_low[place] else passes.count(False)
        return is_low


def _equal(batch: pa.RecordBatch, column: str, value: str) -> np.ndarray:
    mask: np.ndarray = pc.equal(batch[column], value).to_numpy(zero_copy_only=False)
    return mask


def _column(batch: pa.RecordBatch, name: str, dtype: Any) -> np.ndarray:
    """A column of numbers; zeros where it was not asked for."""
    if name not in batch.schema.names:
        return np.zeros(len(batch), dtype)
    return batch[name].to_numpy(zero_copy_only=False).astype(dtype)


def _codes(batch: pa.RecordBatch, name: str, known: dict[str, int]) -> np.ndarray:
    """Texts as their places in `known`, which new ones are added to."""
    encoded = batch[name].dictionary_encode()
    places = [known.setdefault(text, len(known)) for text in encoded.dictionary.to_pylist()]
    return np.array(places, np.int32)[encoded.indices.to_numpy(zero_copy_only=False)]
