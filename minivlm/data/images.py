"""Pictures from outside, opened with limits. The same functions serve ingest, encoding and the HTTP endpoint.

What cannot be opened raises `BadImage` with a reason that fits on a line; nothing is ever repaired in silence.
"""

import hashlib
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PureWindowsPath

import numpy as np
from PIL import Image, ImageOps

from minivlm.data.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BadImage(ValueError):
    """A picture or a video, or its path, is refused; the text is the reason."""


@dataclass(frozen=True)
class ImageLimits:
    """Caps that are checked before anything is decoded.

    Args:
        max_bytes: encoded size, in bytes.
        max_pixels: width x height.
        max_side: longest side, in pixels.
        max_aspect: longest over shortest side (a 1 x 600 picture would cost 293 MB in CLIP's resize).
    """

    max_bytes: int
    max_pixels: int
    max_side: int
    max_aspect: float


def open_image(data: bytes, limits: ImageLimits) -> Image.Image:
    """Decode a picture to RGB, upright (EXIF), first frame; transparency is laid on white, 16 bits scaled to 8.

    Raises:
        BadImage: over a limit, not one of FORMATS whatever its name says, truncated or corrupt.
    """
    if len(data) > limits.max_bytes:
        raise BadImage(f"{len(data)} bytes, more than data.max_image_bytes={limits.max_bytes}")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            check_size(image.size, limits)
            image.load()
            upright = ImageOps.exif_transpose(image)
            return to_rgb(upright)
    except BadImage:
        raise
    except DECODER_ERRORS as error:
        raise BadImage(f"not a readable picture ({type(error).__name__}: {one_line(error)})") from None


def resolve_image(root: Path, name: str) -> Path:
    """Path of a picture named by a data file; it must lie inside `root`, links followed.

    Raises:
        BadImage: not a relative file name, leaves `root`, or there is no such file.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadImage("the image is not a file name")
    shown = repr(name[:120])
    if name.startswith(("/", "\\", "~")) or PureWindowsPath(name).drive or "://" in name or name.startswith("data:"):
        raise BadImage(f"{shown} is not relative to the image root")
    if ".." in PureWindowsPath(name).parts:
        raise BadImage(f"{shown} leaves the image root")
    base = root.resolve()
    try:
        path = (base / name).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        raise BadImage(f"no file {shown} under {root}") from None
    if base not in path.parents:
        raise BadImage(f"{shown} leaves the image root through a link")
    if not path.is_file():
        raise BadImage(f"{shown} under {root} is not a file")
    return path


def read_image(path: Path, limits: ImageLimits) -> tuple[Image.Image, str]:
    """Decode the file and digest its bytes: (RGB picture, hex sha256). The size is checked before reading.

    Raises:
        BadImage: see `open_image`; or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limits.max_bytes + 1)
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror})") from None
    return open_image(data, limits), hashlib.sha256(data).hexdigest()


def read_validated_image(path: Path, digest: str, limits: ImageLimits) -> Image.Image:
    """The RGB picture of a validated row, which must still be the one that was validated.

    Raises:
        DataError: the file cannot be read any more, or its bytes have another sha256 than `digest`.
    """
    try:
        image, found = read_image(path, limits)
    except BadImage as error:
        raise DataError(f"{path}: {error}, though it was fine when rows were validated. Prepare again") from None
    if found != digest:
        raise DataError(f"{path} changed since the rows were validated. Prepare again: touch the data file first")
    return image


def check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    """Width and height of a picture, or of a frame of a video, against the limits.

    Raises:
        BadImage: naming the limit.
    """
    width, height = size
    if min(size) < 1:
        raise BadImage(f"{width} x {height} pixels")
    if max(size) > limits.max_side:
        raise BadImage(f"{width} x {height} pixels, a side longer than data.max_image_side_px={limits.max_side}")
    if width * height > limits.max_pixels:
        raise BadImage(f"{width} x {height} pixels, more than data.max_image_pixels={limits.max_pixels}")
    if max(size) > limits.max_aspect * min(size):
        raise BadImage(f"{width} x {height} pixels, a longer shape than data.max_aspect_ratio={limits.max_aspect:g}")


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded picture of any mode as RGB; transparency is laid on white, 16 bits scaled to 8."""
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")


def one_line(error: BaseException) -> str:
    """An error's text without line ends, not too long."""
    return " ".join(str(error).split())[:160]
