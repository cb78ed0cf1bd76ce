"""What a source's `path` names -> annotation files: a file, a folder, a pattern, a catalogue of others, a hub data set.

Catalogues are MMPR's meta.json ({name: {root, annotation, repeat_time}}) and LLaMA-Factory's dataset_info.json
({name: {file_name, columns}}); `subset` chooses an entry, in a hub data set a folder.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minivlm.data.errors import DataError
from minivlm.data.readers import ENDINGS

HUB = "hf://datasets/"
OUR_NAMES = {
    "messages": "conversations",
    "images": "images",
    "videos": "videos",
    "chosen": "chosen",
    "rejected": "rejected",
}
"""LLaMA-Factory's names of columns -> the keys that `minivlm.data.formats` knows."""


@dataclass(frozen=True)
class AnnotationFile:
    """One file of rows."""

    path: Path
    image_root: Path
    repeat: float = 1.0
    """How often each row is used; below 1 the share of the rows that is."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Keys of the file's rows -> the keys that `minivlm.data.formats` knows, where they differ."""


def find_files(location: str, image_root: Path | None, subset: str | None) -> list[AnnotationFile]:
    """All files that a source names, in a fixed order; a hub data set is downloaded.

    Args:
        location: path, folder, glob pattern, or `hf://datasets/OWNER/NAME[@REVISION]`.
        image_root: what pictures' names are relative to; by default the folder of each file.

    Raises:
        DataError: nothing is there, or a catalogue's entry cannot be used.
    """
    try:
        return _find(location, image_root, subset)
    except DataError:
        raise
    except (ValueError, OSError, RuntimeError) as error:  # odd patterns and names, loops of links
        raise DataError(f"{location[:200]!r} cannot be looked up ({error}). Correct `path` of that source") from None


def _find(location: str, image_root: Path | None, subset: str | None) -> list[AnnotationFile]:
    if location.startswith(HUB):
        return _in_folder(_download(location, subset), image_root)
    path = Path(location).expanduser().absolute()
    if path.is_dir():
        return _in_folder(path / subset if subset else path, image_root)
    if not path.exists() and any(character in path.name for character in "*?["):
        return [_plain(file, image_root) for file in _some(sorted(path.parent.glob(path.name)), location)]
    if path.suffix == ".json" and path.is_file() and _first_character(path) == "{":
        return _from_catalogue(path, image_root, subset)
    return [_plain(path, image_root)]


def _plain(path: Path, image_root: Path | None) -> AnnotationFile:
    return AnnotationFile(path, (image_root or path.parent).expanduser().absolute())  # a link keeps its ending


def _in_folder(folder: Path, image_root: Path | None) -> list[AnnotationFile]:
    """All files of rows; a .json that is an object describes others."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in ENDINGS and file.is_file())
    rows = [file for file in files if file.suffix != ".json" or _first_character(file) != "{"]
    return [_plain(file, image_root) for file in _some(rows, str(folder))]


def _some(files: list[Path], location: str) -> list[Path]:
    if not files:
        raise DataError(f"No {', '.join(ENDINGS)} file in {location}. Correct `path` in the config's `data` section")
    return files


def _first_character(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(4096).decode("utf-8", "replace").lstrip("\ufeff \t\r\n")[:1]


def _from_catalogue(path: Path, image_root: Path | None, subset: str | None) -> list[AnnotationFile]:
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}). Correct the file") from None
    if subset is not None and subset not in entries:
        raise DataError(f"{path} has no entry {subset!r}. `subset` is one of: {', '.join(sorted(entries)[:20])}")
    files = []
    for name, entry in entries.items() if subset is None else [(subset, entries[subset])]:
        if not isinstance(entry, dict) or not ({"annotation", "file_name"} & entry.keys()):
            raise DataError(
                f"{path}, entry {name!r}: neither MMPR's `annotation` nor LLaMA-Factory's `file_name`. A file of rows "
                "is a list: [{...}, ...]"
            )
        files.append(_entry(path, name, entry, image_root))
    return files


def _entry(path: Path, name: str, entry: dict[str, Any], image_root: Path | None) -> AnnotationFile:
    if "annotation" in entry:
        root = image_root or path.parent / str(entry.get("root", ""))
        repeat = entry.get("repeat_time", 1)
        if isinstance(repeat, bool) or not isinstance(repeat, int | float) or not 0 < repeat <= 100:
            raise DataError(f"{path}, entry {name!r}: `repeat_time` is {str(repeat)[:40]}, not a number above 0 to 100")
        return AnnotationFile((path.parent / str(entry["annotation"])).absolute(), root.absolute(), float(repeat))
    if entry.get("formatting", "alpaca") != "sharegpt":
        raise DataError(f"{path}, entry {name!r}: only `formatting: sharegpt` has conversations with pictures")
    columns = entry.get("columns", {})
    unknown = sorted(set(columns) - set(OUR_NAMES)) if isinstance(columns, dict) else ["no object"]
    if unknown:
        known = ", ".join(OUR_NAMES)
        raise DataError(f"{path}, entry {name!r}: `columns` has {', '.join(unknown)}; known are {known}")
    if len(set(columns.values())) < len(columns):
        raise DataError(f"{path}, entry {name!r}: `columns` names one column twice")
    renamed = {str(theirs): OUR_NAMES[ours] for ours, theirs in columns.items()}
    file = (path.parent / str(entry["file_name"])).absolute()
    return AnnotationFile(file, (image_root or path.parent).absolute(), columns=renamed)


def _download(location: str, subset: str | None) -> Path:
    """Folder with a hub data set's parquet files (or others we read); kept in the hub library's cache."""
    from huggingface_hub import snapshot_download  # only users of hub data pay for importing it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = location.removeprefix(HUB).partition("@")
    patterns = [f"{subset}/*" if subset else f"*{ending}" for ending in ENDINGS]
    try:
        folder = snapshot_download(name, repo_type="dataset", revision=revision or None, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{location}: cannot be downloaded ({reason}). Check the name, the network and HF_TOKEN"
        ) from None
    return Path(folder) / (subset or "")
