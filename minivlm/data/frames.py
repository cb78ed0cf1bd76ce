"""Frames of a video file, in order of time: what FFmpeg reads (`Film`) and what Pillow reads (`Animation`).

Nothing is believed that a file's header says of its length. The file is handed to FFmpeg open and with its format, of
which playlists are none, and a format that asks for another file or for the network is refused. Only the first video
stream is decoded, on one thread. Used by `minivlm.data.video`.
"""

import time
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from io import BufferedReader, BytesIO

import av
from av import VideoFrame
from av.container import InputContainer
from av.stream import Disposition
from av.video import VideoStream
from PIL import Image, ImageOps, ImageSequence

from minivlm.data.images import BadImage, ImageLimits, check_size, to_rgb

MAGIC_BYTES = 12
BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip")
"""How mp4 and mov files may begin, after a length of four bytes."""

CODECS = (
    "h264", "hevc", "libdav1d", "av1", "vp8", "vp9", "libvpx", "libvpx-vp9", "mpeg4", "mpeg2video", "mpeg1video",
    "mjpeg", "msmpeg4v3", "msmpeg4v2", "h263", "prores", "theora",
)  # fmt: skip
"""FFmpeg decoders that may run; a stream of any other is refused."""

MAX_STREAMS = 16
ZERO_DELAY = Fraction(1, 10)
"""Seconds of an animation's frame that names none, as browsers show it."""

VideoFile = BufferedReader | BytesIO
Frame = VideoFrame | Image.Image
Frames = Iterator[tuple[Fraction, Frame]]


def file_kind(head: bytes) -> str:
    """FFmpeg's name of the format, or GIF or WEBP, from the first MAGIC_BYTES of a file.

    Raises:
        BadImage: none that is read.
    """
    if head[4:8] in BOXES:
        return "mov"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head.startswith(b"RIFF") and head[8:12] in (b"AVI ", b"WEBP"):
        return {b"AVI ": "avi", b"WEBP": "WEBP"}[head[8:12]]
    raise BadImage("not a video that is read: mp4, mov, webm, mkv, avi, animated GIF or WebP")


class Budget:
    """Counts frames and this thread's CPU time."""

    def __init__(self, max_frames: int, max_seconds: float) -> None:
        self._max_frames, self._max_seconds = max_frames, max_seconds
        self._frames, self._started = 0, time.thread_time()

    def spend(self, frames: int) -> None:
        """Call for every frame decoded, and with 0 in between.

        Raises:
            BadImage: no more is allowed.
        """
        self._frames += frames
        if self._frames > self._max_frames:
            raise BadImage(f"more than data.max_video_frames={self._max_frames} frames to decode")
        if time.thread_time() - self._started > self._max_seconds:
            raise BadImage(f"more than data.max_video_decode_s={self._max_seconds:g} s of CPU time to decode")


class Film:
    """Frames of a file that FFmpeg reads."""

    def __init__(self, file: VideoFile, kind: str, limits: ImageLimits, budget: Budget) -> None:
        self._file, self._kind, self._limits, self._budget = file, kind, limits, budget
        self._keys, self._key_times = array("q"), array("q")  # places of key frames among the packets, and times

    def span(self) -> tuple[Fraction, Fraction]:
        """Time of the first frame and of the end of the last, in seconds. Reads all packets and decodes none."""
        count, shown, first, last, latest = 0, 0, 2**63, -(2**63), Fraction(0)
        with self._open() as (container, stream, unit):
            for packet in container.demux():
                self._budget.spend(0)
                when = packet.dts if packet.pts is None else packet.pts
                if not packet.size:
                    continue
                if packet.is_corrupt:
                    raise BadImage("not a readable video (truncated)")
                if when is not None:
                    latest = max(latest, (when + (packet.duration or 0)) * packet.time_base)
                if packet.stream_index != stream.index:
                    continue
                if when is None:
                    raise BadImage("not a readable video (frames without a time)")
                if packet.is_keyframe:
                    self._keys.append(count)
                    self._key_times.append(when)
                count += 1
                if not packet.is_discard:
                    shown, first, last = shown + 1, min(first, when), max(last, when)
            if not shown:
                raise BadImage("no frame in the video")
            _check_end(container, latest)
            frame = Fraction(last - first, shown - 1) if shown > 1 else Fraction(0)
            return first * unit, (last + frame) * unit

    def frames(self, moments: Sequence[Fraction]) -> Iterator[tuple[Fraction, VideoFrame]]:
        """Frames in order of time; between two moments those may be left out that stand before the last key frame.

        Args:
            moments: increasing, in seconds; none gives all frames.
        """
        with self._open() as (container, stream, unit):
            decoder, passed, is_decoding = stream.codec_context, 0, True
            for place, packet in enumerate(packet for packet in container.demux(stream) if packet.size):
                if moments and not is_decoding:
                    is_decoding = place >= self._start(moments[passed], unit)
                for frame in decoder.decode(packet) if is_decoding else ():
                    when = self._time(frame, unit)
                    yield when, frame
                    while passed < len(moments) and when > moments[passed]:
                        passed += 1
                if moments and passed == len(moments):
                    return
                if is_decoding and moments and self._start(moments[passed], unit) > place + 1:
                    decoder.flush_buffers()
                    is_decoding = False
            for frame in decoder.decode(None):
                yield self._time(frame, unit), frame

    def _start(self, moment: Fraction, unit: Fraction) -> int:
        """The last key frame that is shown no later than `moment`: its place among the packets."""
        index = bisect_right(self._key_times, moment / unit)
        return self._keys[index - 1] if index else 0

    def _time(self, frame: VideoFrame, unit: Fraction) -> Fraction:
        self._budget.spend(1)
        check_size((frame.width, frame.height), self._limits)
        if frame.pts is None:
            raise BadImage("not a readable video (frames without a time)")
        return frame.pts * unit

    @contextmanager
    def _open(self) -> Iterator[tuple[InputContainer, VideoStream, Fraction]]:
        self._file.seek(0)
        most = {"max_pixels": str(2 * self._limits.max_pixels)}  # decoders count padding too
        options = {**most, "codec_whitelist": ",".join(CODECS), "max_streams": str(MAX_STREAMS), "threads": "1"}
        with av.open(self._file, "r", format=self._kind, options=options, io_open=_refuse) as container:
            films = [s for s in container.streams.video if Disposition.attached_pic not in s.disposition]
            if not films:
                raise BadImage("no picture in the video, only sound" if container.streams.audio else "no video stream")
            decoder = films[0].codec_context
            if decoder is None or decoder.codec.name not in CODECS:
                name = decoder.codec.name if decoder else "unknown"
                raise BadImage(f"its codec is {name}, not one of {', '.join(CODECS)}")
            unit = films[0].time_base
            if unit is None:
                raise BadImage("not a readable video (frames without a time)")
            check_size((decoder.width, decoder.height), self._limits)
            decoder.options, decoder.thread_count, decoder.thread_type = most, 1, "NONE"
            yield container, films[0], unit


class Animation:
    """Frames of an animated GIF or WebP, transparency laid on white."""

    def __init__(self, file: VideoFile, kind: str, limits: ImageLimits, budget: Budget) -> None:
        self._file, self._kind, self._limits, self._budget = file, kind, limits, budget

    def span(self) -> tuple[Fraction, Fraction]:
        """0 and the sum of the frames' times, in seconds."""
        return Fraction(0), sum((lasts for lasts, _ in self._all()), Fraction(0))

    def frames(self, moments: Sequence[Fraction]) -> Iterator[tuple[Fraction, Image.Image]]:
        """All frames in order of time."""
        when = Fraction(0)
        for lasts, frame in self._all():
            yield when, frame
            when += lasts

    def _all(self) -> Iterator[tuple[Fraction, Image.Image]]:
        self._file.seek(0)
        with Image.open(self._file, formats=[self._kind]) as image:
            for frame in ImageSequence.Iterator(image):
                check_size(frame.size, self._limits)
                frame.load()
                self._budget.spend(1)
                yield (
                    Fraction(frame.info.get("duration") or 0) / 1000 or ZERO_DELAY,
                    to_rgb(ImageOps.exif_transpose(frame)),
                )


def _refuse(url: str, flags: int, options: dict[str, str]) -> BytesIO:
    raise PermissionError("the video asks for another file")


def _check_end(container: InputContainer, latest: Fraction) -> None:
    """A file that was cut loses packets in silence, but its header still says how long it was."""
    told = Fraction(container.duration or 0, av.time_base)
    if told - latest > 1 + told / 10:
        raise BadImage(f"not a readable video (truncated: {float(latest):.1f} of {float(told):.1f} s are there)")
