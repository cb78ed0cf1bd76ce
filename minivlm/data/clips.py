"""Rows with videos -> rows with pictures: a video becomes the frames chosen of it, and nothing later knows of videos.

Frames are kept as JPEG files under their digests beside the pictures that lay inside of rows. A record under the digest
of the video's bytes and the rules says which they were, so that a video is decoded once, whoever asks again.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import file_digest, sha256
from io import BytesIO
from pathlib import Path
from typing import Any

from minivlm.data.errors import RowError
from minivlm.data.frames import VideoFile
from minivlm.data.images import BadImage, ImageLimits, open_image, resolve_image
from minivlm.data.video import VideoRules, check_bytes, read_video
from minivlm.schema import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from minivlm.storage import write_bytes, write_json

JPEG_QUALITY = 95
FORMAT = 1
"""Raised when the same rules choose or keep other frames."""

MARK = re.compile(f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}")


@dataclass(frozen=True)
class Kept:
    """A picture on disk."""

    path: str
    digest: str


@dataclass(frozen=True)
class Clip:
    """A video as its chosen frames; `digest` is that of its bytes, `seconds` counts from its first frame."""

    digest: str
    frames: tuple[Kept, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class ClipRules:
    """What videos and their frames must keep to, and where frames go."""

    video: VideoRules
    limits: ImageLimits
    folder: str


def keep_picture(data: bytes, limits: ImageLimits, folder: str) -> Kept:
    """Write an encoded picture once, under its digest.

    Raises:
        BadImage: it cannot be opened.
    """
    open_image(data, limits)
    digest = sha256(data).hexdigest()
    path = _path(folder, digest)
    if _size(path) != len(data):  # a power cut may have emptied it: it was written without fsync
        write_bytes(path, data, sync=False)
    return Kept(str(path), digest)


def open_clip(video: str | bytes, root: Path, rules: ClipRules) -> Clip:
    """The frames of a video, chosen and kept.

    Args:
        video: file name relative to `root`, or the file's bytes.

    Raises:
        BadImage: naming the video.
    """
    if isinstance(video, bytes):
        try:
            return _keep_frames(BytesIO(video), rules)
        except BadImage as error:
            raise BadImage(f"video in the row: {error}") from None
    try:
        path = resolve_image(root, video)
        status = path.stat()
    except (BadImage, OSError) as error:
        raise BadImage(f"video: {error}") from None
    clip = _open_file(str(path), status.st_mtime_ns, status.st_size, rules)
    if isinstance(clip, str):
        raise BadImage(f"video {video!r}: {clip}")
    return clip


@lru_cache(maxsize=10_000)
def _open_file(path: str, modified_ns: int, size: int, rules: ClipRules) -> Clip | str:
    """The clip, or why not; remembered per process while the file stays as it is: rows share videos."""
    try:
        with Path(path).open("rb") as file:
            return _keep_frames(file, rules)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except BadImage as error:
        return str(error)


def _keep_frames(file: VideoFile, rules: ClipRules) -> Clip:
    check_bytes(file, rules.video)
    digest = file_digest(file, "sha256").hexdigest()
    key = sha256(repr((FORMAT, digest, rules.video, rules.limits)).encode()).hexdigest()
    record = Path(rules.folder) / "clips" / key[:2] / f"{key}.json"
    if record.exists():
        found = json.loads(record.read_bytes())
        frames = tuple(Kept(str(_path(rules.folder, frame)), frame) for frame in found["frames"])
        if all(_size(Path(frame.path)) > 0 for frame in frames):
            return Clip(digest, frames, tuple(found["seconds"]))
    chosen = read_video(file, rules.video, rules.limits)
    frames = tuple(keep_picture(_jpeg(picture), rules.limits, rules.folder) for _, picture in chosen)
    clip = Clip(digest, frames, tuple(seconds for seconds, _ in chosen))
    write_json(record, {"frames": [frame.digest for frame in frames], "seconds": clip.seconds})
    return clip


def _jpeg(picture: Any) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _path(folder: str, digest: str) -> Path:
    return Path(folder) / digest[:2] / digest


def _size(path: Path) -> int:
    """In bytes; -1 where there is no file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def place_frames(row: dict[str, Any], clips: Sequence[Clip]) -> dict[str, Any]:
    """A row of `minivlm.data.formats` with each `<video>` of its questions replaced by one `<image>` per frame.

    Without `<video>` the `<image>`s stand for the videos where the row has no picture and as many of them
    (LLaVA-Video); without either the videos come before the first question.

    Args:
        clips: of the row's `videos`, in their order.

    Returns:
        The row with the frames among its `images`, in the order of the placeholders.

    Raises:
        RowError: placeholders unlike the videos or the images.
    """
    turns = row.get("conversations") or [{"from": "human", "value": row["question"]}]
    asked = [place for place, turn in enumerate(turns) if turn["from"] != "gpt"]
    texts = {place: turns[place]["value"] for place in asked}
    joined = "".join(texts.values())
    if VIDEO_PLACEHOLDER not in joined:
        if not row["images"] and joined.count(IMAGE_PLACEHOLDER) == len(clips):
            texts = {place: text.replace(IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER) for place, text in texts.items()}
        else:
            first = next((place for place in asked if turns[place]["from"] == "human"), None)
            if first is None:
                raise RowError("the conversation has no question (`from`: `human`)")
            texts[first] = f"{VIDEO_PLACEHOLDER}\n" * len(clips) + texts[first]
    joined = "".join(texts.values())
    for mark, kind, count in (
        (VIDEO_PLACEHOLDER, "video", len(clips)),
        (IMAGE_PLACEHOLDER, "image", len(row["images"])),
    ):
        if joined.count(mark) != count:
            raise RowError(f"{joined.count(mark)} {mark} placeholder(s) for {count} {kind}(s)")
    images: list[Any] = []
    given, frames = iter(row["images"]), (clip.frames for clip in clips)
    filled = [
        turn | {"value": MARK.sub(lambda mark: _fill(mark[0], given, frames, images), texts[place])}
        if place in texts
        else turn
        for place, turn in enumerate(turns)
    ]
    return (
        row
        | {"images": images}
        | ({"conversations": filled} if "conversations" in row else {"question": filled[0]["value"]})
    )


def _fill(mark: str, given: Iterator[Any], frames: Iterator[tuple[Kept, ...]], images: list[Any]) -> str:
    """The text in place of one placeholder; its pictures are added to `images`."""
    found = (next(given),) if mark == IMAGE_PLACEHOLDER else next(frames)
    images.extend(found)
    return "\n".join([IMAGE_PLACEHOLDER] * len(found))
