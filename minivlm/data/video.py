"""Video files from outside -> a few pictures, by a rule that gives the same pictures wherever it runs.

    uniform   the time from the first frame to the end of the last is cut into N equal parts; of each part the picture
              that is on the screen in its middle: t_i = start + (i + 1/2) * (end - start) / N, i = 0 .. N-1
    scene     the first frame, and the N-1 that differ most from the frame before them: mean absolute difference of
              32 x 32 grey thumbnails; of equal ones the earlier, of none at all
              the frame is left out; in order of time

Times are those of the file, so a variable frame rate does no harm; nothing is believed that a header says of duration
or number of frames. The last frame of a film lasts as long as the others on average. A frame is taken once: a video of
fewer frames, or one that stands still for long, gives fewer pictures than N, and never none.

What is inside decides, not the name: mp4 and mov, webm and mkv, avi, animated GIF and WebP. The file is handed over
open and with its format, of which playlists are none; a format that asks for another file or for the network is
refused. Only the first video stream is decoded, on one thread.
"""

import heapq
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import itemgetter

import av
import numpy as np
from av import VideoFrame
from PIL import Image

from minivlm.data.frames import MAGIC_BYTES, Animation, Budget, Film, Frame, Frames, VideoFile, file_kind
from minivlm.data.images import DECODER_ERRORS, BadImage, ImageLimits, one_line

THUMBNAIL_PX = 32


@dataclass(frozen=True)
class VideoRules:
    """What is taken of a video, and what it may cost. Docs of the values are those of the `data.video_*` settings.

    Args:
        num_frames: N above.
        rule: `uniform` or `scene`.
        side_px: longer pictures are made smaller, so that this is their longest side.
        max_bytes: size of the file.
        max_seconds: from the first frame to the end of the last.
        max_frames: frames decoded.
        max_decode_s: CPU time, in seconds.
    """

    num_frames: int
    rule: str
    side_px: int
    max_bytes: int
    max_seconds: float
    max_frames: int
    max_decode_s: float


def read_video(file: VideoFile, rules: VideoRules, limits: ImageLimits) -> list[tuple[float, Image.Image]]:
    """The chosen frames as (seconds from the first frame, RGB picture), upright, in order of time; at least one.

    Args:
        file: at its beginning; seekable.
        limits: of a picture; they hold for every frame before it is decoded.

    Raises:
        BadImage: over a limit, none of the formats whatever its name says, no picture in it, truncated or corrupt.
    """
    check_bytes(file, rules)
    kind = file_kind(file.read(MAGIC_BYTES))
    budget = Budget(rules.max_frames, rules.max_decode_s)
    count = rules.num_frames
    try:
        reader = Animation(file, kind, limits, budget) if kind in ("GIF", "WEBP") else Film(file, kind, limits, budget)
        start, end = reader.span()
        if end - start > rules.max_seconds:
            raise BadImage(f"{float(end - start):.0f} s long, more than data.max_video_s={rules.max_seconds:g}")
        if rules.rule == "uniform":
            moments = [start + (end - start) * Fraction(2 * i + 1, 2 * count) for i in range(count)]
            chosen = _shown_at(moments, reader.frames(moments))
        else:
            chosen = _scenes(count, reader.frames(()))
        pictures = [(float(when - start), _picture(frame, rules.side_px)) for when, frame in chosen]
        if not pictures:
            raise BadImage("no frame in the video")
        return sorted(pictures, key=itemgetter(0))
    except BadImage:
        raise
    except av.error.FFmpegError as error:
        raise BadImage(f"not a readable video ({error.strerror})") from None
    except DECODER_ERRORS as error:
        raise BadImage(f"not a readable video ({type(error).__name__}: {one_line(error)})") from None


def check_bytes(file: VideoFile, rules: VideoRules) -> None:
    """Leaves the file at its beginning.

    Raises:
        BadImage: it is too large.
    """
    size = file.seek(0, os.SEEK_END)
    if size > rules.max_bytes:
        raise BadImage(f"{size} bytes, more than data.max_video_bytes={rules.max_bytes}")
    file.seek(0)


def _shown_at(moments: Sequence[Fraction], frames: Frames) -> Frames:
    """Of each moment the last frame that began no later, or the first of all; a frame once, and none kept here."""
    taken: set[Fraction] = set()
    shown: tuple[Fraction, Frame] | None = None
    passed = 0
    for when, frame in frames:
        shown = shown or (when, frame)
        is_due = when > moments[passed]
        while passed < len(moments) and when > moments[passed]:
            passed += 1
        if is_due and shown[0] not in taken:
            taken.add(shown[0])
            yield shown
        if passed == len(moments):
            return
        shown = when, frame
    if shown and shown[0] not in taken:
        yield shown


def _scenes(count: int, frames: Frames) -> Frames:
    """The first frame, and those `count` - 1 that differ most from the one before them."""
    best: list[tuple[float, int, Fraction, Frame]] = []
    before: np.ndarray | None = None
    for place, (when, frame) in enumerate(frames):
        now = _thumbnail(frame)
        change = np.inf if before is None else float(np.abs(now - before).mean())
        before = now
        if change:
            push = heapq.heappush if len(best) < count else heapq.heappushpop
            push(best, (change, -place, when, frame))
    yield from ((when, frame) for _, _, when, frame in best)


def _thumbnail(frame: Frame) -> np.ndarray:
    """[32, 32] float32 of grey from 0 to 255."""
    if isinstance(frame, VideoFrame):
        small = frame.reformat(
            width=THUMBNAIL_PX, height=THUMBNAIL_PX, format="gray", interpolation="AREA"
        ).to_ndarray()
    else:
        small = np.asarray(frame.convert("L").resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX))
    return small.astype(np.float32)


def _picture(frame: Frame, side_px: int) -> Image.Image:
    """RGB, turned as the file asks for, no side longer than `side_px`."""
    if isinstance(frame, VideoFrame):
        if frame.is_corrupt:
            raise BadImage("not a readable video (a frame is damaged)")
        picture: Image.Image = frame.to_image().rotate(90 * round(frame.rotation / 90), expand=True)
    else:
        picture = frame
    picture.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    return picture
