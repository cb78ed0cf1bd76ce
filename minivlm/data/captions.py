"""Pictures with the texts that belong to them, for retrieval and zero-shot classification: files and test rows.

Three sources: captions of validated rows, a COCO or Karpathy captions file, a folder per class. What cannot be used is
set aside with file, row and reason, as in the data steps.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivlm.data.errors import DataError
from minivlm.data.images import BadImage, resolve_image
from minivlm.schema import BadRow, Sample

_Row = tuple[int, Any, list[Any], str]
"""Place in its list, file name, captions, reason against it; the last three as found in the file."""

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class CaptionSet:
    """`captions[i]` belong to `pictures[i]`; a picture has at least one."""

    pictures: tuple[Path, ...]
    captions: tuple[tuple[str, ...], ...]
    bad: tuple[BadRow, ...] = ()


@dataclass(frozen=True)
class ClassSet:
    """`labels[i]` is the place of the class of `pictures[i]` among `names`."""

    names: tuple[str, ...]
    pictures: tuple[Path, ...]
    labels: tuple[int, ...]
    bad: tuple[BadRow, ...] = ()


def caption_of(sample: Sample) -> str:
    """The caption of a pretrain sample."""
    return sample.messages[-1].content


def captioned(samples: Iterable[Sample]) -> list[Sample]:
    """Samples with one picture, in English where there are any: what a CLIP is trained on."""
    single = [sample for sample in samples if len(sample.images) == 1]
    english = [sample for sample in single if sample.language == "en"]
    return english or single


def row_captions(samples: Iterable[Sample]) -> CaptionSet:
    """Captions of validated rows, those about one picture together."""
    captions: dict[str, list[str]] = {}
    paths: dict[str, Path] = {}
    for sample in captioned(samples):
        paths.setdefault(sample.image_sha256[0], Path(sample.images[0]))
        captions.setdefault(sample.image_sha256[0], []).append(caption_of(sample))
    return CaptionSet(tuple(paths.values()), tuple(tuple(texts) for texts in captions.values()))


def read_captions(path: Path, image_root: Path) -> CaptionSet:
    """A captions file of COCO (`images`, `annotations`) or of Karpathy's splits (`images` with `sentences`).

    Of a file with splits the rows of `test` count. Pictures are relative to `image_root`.

    Raises:
        DataError: no such file, none of both formats, or no usable row.
    """
    try:
        root = json.loads(path.read_bytes())
        images = list(root["images"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is no captions file ({type(error).__name__}: {error}). Give COCO's captions_val2014.json or "
            "Karpathy's dataset_coco.json"
        ) from None
    rows = _karpathy_rows(images) if "annotations" not in root else _coco_rows(images, root["annotations"])
    pictures, captions, bad, seen = [], [], [], set()
    for number, name, texts, reason in rows:
        try:
            if reason or str(name) in seen:
                raise BadImage(reason or f"picture {str(name)[:120]!r} a second time")
            seen.add(str(name))
            usable = tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())
            if not usable:
                raise BadImage("no caption with text")
            pictures.append(resolve_image(image_root, name))
            captions.append(usable)
        except BadImage as error:
            bad.append(BadRow(str(path), number, str(error)))
    if not pictures:
        first = f" (row {bad[0].row}: {bad[0].reason})" if bad else ""
        raise DataError(
            f"{path} has no usable row{first}. Pictures are looked for under {image_root}: type --image-root"
        )
    return CaptionSet(tuple(pictures), tuple(captions), tuple(bad))


def read_classes(folder: Path) -> ClassSet:
    """A folder with a folder of pictures for each class; `_` in its name stands for a blank.

    Raises:
        DataError: fewer than two classes with pictures.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Give one with a folder of pictures for each class")
    names: list[str] = []
    pictures: list[Path] = []
    labels: list[int] = []
    bad: list[BadRow] = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        found = sorted(path for path in place.iterdir() if path.suffix.lower() in PICTURE_ENDINGS and path.is_file())
        if not found:
            bad.append(BadRow(str(place), 0, "a class without pictures"))
            continue
        pictures += [path.resolve() for path in found]
        labels += [len(names)] * len(found)
        names.append(place.name.replace("_", " "))
    if len(names) < 2:
        raise DataError(
            f"{folder} has {len(names)} folder(s) with pictures: zero-shot classification needs two classes"
        )
    return ClassSet(tuple(names), tuple(pictures), tuple(labels), tuple(bad))


def _coco_rows(images: list[Any], annotations: Any) -> list[_Row]:
    captions: dict[Any, list[Any]] = {}
    rows: list[_Row] = []
    for number, entry in enumerate(images):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int | str):
            rows.append((number, "", [], "a picture without `id`"))
        elif entry["id"] in captions:
            rows.append((number, "", [], f"id {entry['id']!r} a second time"))
        else:
            rows.append((number, entry.get("file_name"), captions.setdefault(entry["id"], []), ""))
    for number, entry in enumerate(annotations if isinstance(annotations, list) else []):
        if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), int | str):
            rows.append((number, "", [], "an annotation without `image_id`"))
        elif entry["image_id"] not in captions:
            rows.append((number, "", [], f"an annotation of picture {entry['image_id']!r}, which is not listed"))
        else:
            captions[entry["image_id"]].append(entry.get("caption"))
    return rows


def _karpathy_rows(images: list[Any]) -> list[_Row]:
    rows: list[_Row] = []
    for number, entry in enumerate(images):
        if not isinstance(entry, dict) or not isinstance(entry.get("sentences"), list):
            rows.append((number, "", [], "a picture without `sentences`"))
        elif entry.get("split", "test") == "test":
            name, folder = entry.get("filename"), entry.get("filepath")
            raw = [sentence.get("raw") for sentence in entry["sentences"] if isinstance(sentence, dict)]
            rows.append((number, f"{folder}/{name}" if folder else name, raw, ""))
    return rows
