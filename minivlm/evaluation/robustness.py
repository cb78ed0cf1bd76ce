"""Pictures made worse on purpose, always in the same way: what the variants jpeg, blur, rotate and occlude show.

| variant | what is done to the picture |
|---|---|
| `jpeg` | stored as JPEG of quality 10 |
| `blur` | Gaussian blur of a standard deviation of 2 % of the shorter side |
| `rotate` | turned by 15 degrees against the clock; size kept, corners white |
| `occlude` | a grey square of 35 % of the shorter side, at a place that the picture's digest determines |

Occlusion and rotation may hide or cut off what is asked for: their scores have a ceiling below the plain one.
"""

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import pyarrow as pa
from PIL import Image, ImageFilter

from minivlm.config import Config
from minivlm.data.clips import keep_picture
from minivlm.data.errors import DataError
from minivlm.data.images import BadImage, read_validated_image
from minivlm.data.settings import image_limits
from minivlm.data.stream import map_tasks
from minivlm.layout import pictures_dir

JPEG_QUALITY = 10
BLUR_SHARE = 0.02
ROTATE_DEGREES = 15.0
OCCLUDE_SHARE = 0.35
GREY = (128, 128, 128)
_PICTURES_PER_TASK = 64
Transformed = dict[str, dict[str, tuple[str, str]]]
"""Kind -> digest of a picture -> (digest, path) of what became of it."""


def transform(image: Image.Image, kind: str, digest: str) -> bytes:
    """The encoded picture in one of these variants; the same bytes every time.

    Args:
        image: RGB.
        digest: hex sha256 of the picture's file; it places the square of `occlude`.
    """
    buffer = BytesIO()
    if kind == "jpeg":
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()
    short = min(image.size)
    if kind == "blur":
        changed = image.filter(ImageFilter.GaussianBlur(BLUR_SHARE * short))
    elif kind == "rotate":
        changed = image.rotate(ROTATE_DEGREES, Image.Resampling.BICUBIC, fillcolor="white")
    else:
        side = max(1, round(OCCLUDE_SHARE * short))
        left = int(digest[:8], 16) % (image.width - side + 1)
        top = int(digest[8:16], 16) % (image.height - side + 1)
        changed = image.copy()
        changed.paste(GREY, (left, top, left + side, top + side))
    changed.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def transform_pictures(config: Config, pictures: Mapping[str, str], kinds: Sequence[str]) -> Transformed:
    """Write every picture in every kind, in Ray tasks; those that lie there already are only named.

    Args:
        pictures: digest -> path.

    Raises:
        DataError: a file is no longer what it was when it was validated, or its changed form is over a limit.
    """
    found: Transformed = {kind: {} for kind in kinds}
    if not kinds or not pictures:
        return found
    items = sorted(pictures.items())
    folder, limits = str(pictures_dir(config)), image_limits(config)
    payloads = [
        (items[start : start + _PICTURES_PER_TASK], tuple(kinds), limits, folder)
        for start in range(0, len(items), _PICTURES_PER_TASK)
    ]
    for row in map_tasks(transform_block, payloads, 1.0, None).iter_rows():
        done = json.loads(row["done"])
        if "error" in done:
            raise DataError(done["error"])
        for kind, digest, kept, path in done["pictures"]:
            found[kind][digest] = (kept, path)
    return found


def transform_block(block: pa.Table) -> Iterator[pa.Table]:
    """Ray Data task: (pictures, kinds, limits, folder) -> {pictures: [kind, digest, new digest, path]} or {error}."""
    for payload in block["payload"].to_pylist():
        pictures, kinds, limits, folder = pickle.loads(payload)
        done = []
        try:
            for digest, path in pictures:
                image = read_validated_image(Path(path), digest, limits)
                for kind in kinds:
                    kept = keep_picture(transform(image, kind, digest), limits, folder)
                    done.append([kind, digest, kept.digest, kept.path])
        except DataError as error:
            yield pa.table({"done": [json.dumps({"error": str(error)})]})
            return
        except BadImage as error:
            yield pa.table({"done": [json.dumps({"error": f"variant {kind} of {path}: {error}"})]})
            return
        yield pa.table({"done": [json.dumps({"pictures": done})]})
