"""Token table: encoded samples as flat memory-mapped arrays, opened by path in any process.

    meta.json                      counts and group size
    input_ids.bin labels.bin       int32, all entries end to end      offsets.bin        int64 [E+1]
    images.bin                     int32 rows of digests, end to end  image_offsets.bin  int64 [E+1]
    num_labels.bin                 int64 [E]                          reference_logps.bin float32 [E], MPO only
    digests.bin                    S64 [U], distinct pictures         names.bin name_offsets.bin  sample ids, UTF-8

Samples stream through `TokenTable.write`, so memory does not grow with their number; a table is complete or absent.
"""

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minivlm.data.errors import DataError
from minivlm.storage import new_directory, write_json

IGNORE = -100
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class EncodedSample:
    """One conversation as token ids, pictures already expanded to placeholder runs.

    Args:
        sample_id: the sample's name.
        input_ids: [T] int32.
        labels: [T] int32, aligned with input_ids; -100 = ignore; labels[0] is always -100.
        image_sha256: one digest per placeholder run, in their order.
    """

    sample_id: str
    input_ids: np.ndarray
    labels: np.ndarray
    image_sha256: tuple[str, ...]


class TokenTable:
    """Read side. `table[i]` is an EncodedSample whose arrays are views into the file."""

    def __init__(self, directory: Path, meta: dict[str, Any]) -> None:
        self.directory = Path(directory)
        self.group_size: int = meta["group_size"]
        self._count: int = meta["num_entries"]
        count = self._count
        self._input_ids = self._read("input_ids", np.int32, meta["num_tokens"])
        self._labels = self._read("labels", np.int32, meta["num_tokens"])
        self._offsets = self._read("offsets", np.int64, count + 1)
        self._images = self._read("images", np.int32, meta["num_images"])
        self._image_offsets = self._read("image_offsets", np.int64, count + 1)
        self._digests = self._read("digests", np.dtype("S64"), meta["num_digests"])
        self._names = self._read("names", np.uint8, meta["num_name_bytes"])
        self._name_offsets = self._read("name_offsets", np.int64, count + 1)
        self.num_labels: np.ndarray = self._read("num_labels", np.int64, count)
        """[E] int64: supervised tokens of each entry."""
        self.lengths: np.ndarray = np.diff(self._offsets)
        """[E] int64: tokens of each entry."""
        self.reference_logps: np.ndarray | None = None
        """[E] float32: reference log-probability of each answer, in nats; None outside MPO."""
        if meta["has_reference"]:
            self.reference_logps = self._read("reference_logps", np.float32, count)

    @classmethod
    def open(cls, directory: Path) -> "TokenTable":
        """Map a table.

        Raises:
            DataError: no table there, or a file of the wrong size.
        """
        path = Path(directory) / "meta.json"
        try:
            meta = json.loads(path.read_text())
        except FileNotFoundError:
            raise DataError(
                f"No token table under {directory}. Run the prepare job first: python -m jobs.prepare"
            ) from None
        if meta["format"] != _FORMAT:
            raise DataError(f"{path}: table format {meta['format']}, this version reads {_FORMAT}. Delete {directory}")
        return cls(Path(directory), meta)

    @classmethod
    def write(
        cls,
        directory: Path,
        samples: Iterable[EncodedSample],
        *,
        group_size: int = 1,
        reference_logps: Sequence[float] | None = None,
    ) -> "TokenTable":
        """Write a table (an existing one is kept) and open it.

        Args:
            samples: with group_size g, entries g*i .. g*i+g-1 form unit i (MPO: chosen, rejected).
            reference_logps: one per entry.

        Raises:
            ValueError: shapes differ, a first label is supervised, or counts do not fit group_size.
        """
        directory = Path(directory)
        with new_directory(directory) as folder:
            meta = _Writer(folder).write(samples)
            count = meta["num_entries"]
            if count % group_size:
                raise ValueError(f"{count} entries do not form groups of {group_size}")
            if reference_logps is not None:
                if len(reference_logps) != count:
                    raise ValueError(f"{len(reference_logps)} reference log-probabilities for {count} entries")
                np.asarray(reference_logps, np.float32).tofile(folder / "reference_logps.bin")
            meta |= {"format": _FORMAT, "group_size": group_size, "has_reference": reference_logps is not None}
            write_json(folder / "meta.json", meta)
        return cls.open(directory)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> EncodedSample:
        if not 0 <= index < self._count:
            raise IndexError(f"entry {index} of {self._count} in {self.directory}")
        tokens = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        images = self._images[self._image_offsets[index] : self._image_offsets[index + 1]]
        name = self._names[self._name_offsets[index] : self._name_offsets[index + 1]]
        return EncodedSample(
            sample_id=name.tobytes().decode(),
            input_ids=self._input_ids[tokens],
            labels=self._labels[tokens],
            image_sha256=tuple(self._digests[i].decode() for i in images),
        )

    @property
    def digests(self) -> list[str]:
        """Distinct pictures of the table."""
        return [digest.decode() for digest in self._digests]

    def pictures_of(self, entries: Sequence[int]) -> np.ndarray:
        """Rows of `digests` that the entries show, end to end: int32, a picture as often as it is shown."""
        chosen = np.asarray(entries, np.int64)
        starts, counts = self._image_offsets[chosen], self._image_offsets[chosen + 1] - self._image_offsets[chosen]
        ends = np.cumsum(counts)
        return self._images[np.repeat(starts - ends + counts, counts) + np.arange(counts.sum())]

    def _read(self, name: str, dtype: Any, count: int) -> np.ndarray:
        path = self.directory / f"{name}.bin"
        expected = count * np.dtype(dtype).itemsize
        size = path.stat().st_size if path.exists() else -1
        if size != expected:
            raise DataError(f"{path} has {size} bytes instead of {expected}. Delete {self.directory} and prepare again")
        if not count:
            return np.empty(0, dtype)
        return np.asarray(np.memmap(path, dtype, mode="r", shape=(count,)))


class _Writer:
    """Appends samples to the flat files of one new table."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digests: dict[str, int] = {}

    def write(self, samples: Iterable[EncodedSample]) -> dict[str, int]:
        offsets, image_offsets, name_offsets = array("q", [0]), array("q", [0]), array("q", [0])
        num_labels = array("q")
        with (
            (self._folder / "input_ids.bin").open("wb") as ids,
            (self._folder / "labels.bin").open("wb") as labels,
            (self._folder / "images.bin").open("wb") as images,
            (self._folder / "names.bin").open("wb") as names,
        ):
            for sample in samples:
                _check(sample)
                ids.write(np.ascontiguousarray(sample.input_ids, np.int32).tobytes())
                labels.write(np.ascontiguousarray(sample.labels, np.int32).tobytes())
                rows = [self._digests.setdefault(digest, len(self._digests)) for digest in sample.image_sha256]
                images.write(np.asarray(rows, np.int32).tobytes())
                name = sample.sample_id.encode()
                names.write(name)
                offsets.append(offsets[-1] + len(sample.input_ids))
                image_offsets.append(image_offsets[-1] + len(rows))
                name_offsets.append(name_offsets[-1] + len(name))
                num_labels.append(int(np.count_nonzero(np.asarray(sample.labels) != IGNORE)))
        columns = {"offsets": offsets, "image_offsets": image_offsets, "name_offsets": name_offsets}
        for stem, values in {**columns, "num_labels": num_labels}.items():
            (self._folder / f"{stem}.bin").write_bytes(values.tobytes())
        np.array(list(self._digests), dtype="S64").tofile(self._folder / "digests.bin")
        return {
            "num_entries": len(num_labels),
            "num_tokens": offsets[-1],
            "num_images": image_offsets[-1],
            "num_digests": len(self._digests),
            "num_name_bytes": name_offsets[-1],
        }


def _check(sample: EncodedSample) -> None:
    ids, labels = np.shape(sample.input_ids), np.shape(sample.labels)
    if len(ids) != 1 or ids != labels or ids[0] == 0:
        raise ValueError(
            f"sample {sample.sample_id}: input_ids {ids} and labels {labels} must be equal, flat and not empty"
        )
    if sample.labels[0] != IGNORE:
        raise ValueError(
            f"sample {sample.sample_id}: labels[0] is {sample.labels[0]}, the first token predicts nothing: use -100"
        )
    if any(len(digest) != 64 for digest in sample.image_sha256):
        raise ValueError(f"sample {sample.sample_id}: image_sha256 must be 64 hex digits each")
