"""Writes small videos: frames of known colours at known times."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image

from minivlm.data.video import VideoRules

VIDEO = VideoRules(
    num_frames=4, rule="uniform", side_px=64, max_bytes=1 << 20, max_seconds=60, max_frames=500, max_decode_s=20
)
RED, GREEN, BLUE, WHITE, BLACK = ((220, 0, 0), (0, 200, 0), (0, 0, 220), (255, 255, 255), (0, 0, 0))
Colour = tuple[int, int, int]


def plain(colours: Sequence[Colour], size: tuple[int, int] = (48, 32)) -> list[Image.Image]:
    """One picture of each colour."""
    return [Image.new("RGB", size, colour) for colour in colours]


def write_film(
    path: Path,
    pictures: Sequence[Image.Image],
    *,
    milliseconds: Sequence[int] | None = None,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    sound: bool = False,
) -> Path:
    """Encode at ten frames per second, or at the given times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options or {})
        stream.width, stream.height = pictures[0].size if pictures else (48, 32)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000 if milliseconds else 10)
        audio = container.add_stream("aac", rate=8000) if sound else None
        for place, picture in enumerate(pictures):
            frame = av.VideoFrame.from_image(picture)
            frame.pts = milliseconds[place] if milliseconds else place
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio:
            container.mux(audio.encode(None))
    return path


def write_animation(path: Path, pictures: Sequence[Image.Image], milliseconds: Sequence[int] | int) -> Path:
    """A GIF or WebP by its ending."""
    first, *rest = pictures
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=rest, duration=milliseconds, loop=0, **lossless)
    return path
