"""Where each picture lies, by digest: flat memory-mapped files, so that any process looks paths up and none ships them.

digests.bin   S64 [U], sorted      offsets.bin   int64 [U+1]      paths.bin   UTF-8, end to end
order.bin     int64 [U]: the pictures in the order of the rows, which is how they lie on disk
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minivlm.data.errors import DataError
from minivlm.storage import new_directory


class PicturePaths:
    """Read side: `paths[digest]`."""

    def __init__(self, directory: Path) -> None:
        """Map the files.

        Raises:
            DataError: they are not there, or do not fit each other.
        """
        self.directory = Path(directory)
        self._digests = self._read("digests", "S64")
        self._order = self._read("order", "<i8")
        self._offsets = self._read("offsets", "<i8")
        self._paths = self._read("paths", "u1")
        counts = {len(self._digests), len(self._order), len(self._offsets) - 1}
        if len(counts) > 1 or self._offsets[-1] != len(self._paths):
            raise DataError(f"{self.directory} is damaged. Delete it and run: python -m jobs.prepare")

    @classmethod
    def write(cls, directory: Path, pictures: Mapping[str, str]) -> "PicturePaths":
        """Write paths by digest (existing files are kept) and open them."""
        digests = sorted(pictures)
        texts = [pictures[digest].encode() for digest in digests]
        rows = {digest: row for row, digest in enumerate(digests)}
        with new_directory(Path(directory)) as folder:
            np.asarray(digests, "S64").tofile(folder / "digests.bin")
            np.asarray([rows[digest] for digest in pictures], "<i8").tofile(folder / "order.bin")
            np.cumsum([0, *(len(text) for text in texts)], dtype="<i8").tofile(folder / "offsets.bin")
            (folder / "paths.bin").write_bytes(b"".join(texts))
        return cls(directory)

    def __len__(self) -> int:
        return len(self._digests)

    def __getitem__(self, digest: str) -> str:
        """Path of a picture.

        Raises:
            DataError: no prepared row has it.
        """
        key = np.bytes_(digest.encode())
        row = int(np.searchsorted(self._digests, key))
        if row == len(self._digests) or self._digests[row] != key:
            raise DataError(f"picture {digest} is in no prepared row of {self.directory.parent}. Prepare again")
        return bytes(self._paths[self._offsets[row] : self._offsets[row + 1]]).decode()

    def digests(self) -> list[str]:
        """All pictures, in the order of the rows."""
        return [digest.decode() for digest in self._digests[self._order]]

    def _read(self, name: str, dtype: str) -> np.ndarray:
        path = self.directory / f"{name}.bin"
        try:
            size = path.stat().st_size
            mapped: Any = np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)
        except (OSError, ValueError):
            raise DataError(f"{path} cannot be read. Delete {self.directory} and run: python -m jobs.prepare") from None
        return np.asarray(mapped)
