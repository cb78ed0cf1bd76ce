"""Videos: which frames are taken, by hand; and files that lie, lack parts or ask for too much."""

import io
import resource
import struct
import weakref
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from minivlm.data.frames import Budget, Film
from minivlm.data.images import BadImage, ImageLimits
from minivlm.data.video import VideoRules, _shown_at, read_video
from tests.videos import BLACK, BLUE, GREEN, RED, VIDEO, WHITE, plain, write_animation, write_film

LIMITS = ImageLimits(max_bytes=1 << 20, max_pixels=100_000, max_side=400, max_aspect=20.0)
FILMS = [
    ("a.mp4", "libx264", {"g": "5", "bf": "2"}),
    ("a.mkv", "libx264", {}),
    ("a.webm", "libvpx-vp9", {}),
    ("a.avi", "mpeg4", {"bf": "2"}),
    ("a.mov", "mjpeg", {}),
]
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/passwd\n#EXT-X-ENDLIST\n"


def greys(count: int) -> list[Image.Image]:
    """Frame i is grey 10 + 20 i."""
    return plain([(10 + 20 * i,) * 3 for i in range(count)])


def read(path: Path, rules: VideoRules = VIDEO, limits: ImageLimits = LIMITS) -> list[tuple[float, Image.Image]]:
    with path.open("rb") as file:
        return read_video(file, rules, limits)


def taken(path: Path, rules: VideoRules = VIDEO) -> list[tuple[float, int]]:
    """Time and number of each chosen frame of `greys`."""
    return [
        (round(seconds, 3), round((np.asarray(picture).mean() - 10) / 20)) for seconds, picture in read(path, rules)
    ]


def colours(path: Path, rules: VideoRules = VIDEO) -> list[tuple[int, ...]]:
    """The colour in the middle of each chosen frame, rounded to what codecs keep."""
    names = [RED, GREEN, BLUE, WHITE, BLACK]
    found = [
        np.asarray(picture)[picture.height // 2, picture.width // 2].astype(int) for _, picture in read(path, rules)
    ]
    return [min(names, key=lambda name: np.abs(name - colour).sum()) for colour in found]


def reason(path: Path, rules: VideoRules = VIDEO, limits: ImageLimits = LIMITS) -> str:
    with pytest.raises(BadImage) as caught:
        read(path, rules, limits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "codec", "options"), FILMS)
def test_uniform_takes_what_is_shown_in_the_middle_of_equal_parts(tmp_path, name, codec, options):
    path = write_film(tmp_path / name, greys(12), codec=codec, options=options)
    assert taken(path) == [(0.1, 1), (0.4, 4), (0.7, 7), (1.0, 10)]  # on the screen at 0.15, 0.45, 0.75, 1.05 of 1.2 s


def test_uniform_counts_time_and_not_frames(tmp_path):
    path = write_film(tmp_path / "a.mp4", greys(5), milliseconds=[0, 100, 5000, 5100, 9000])
    # the last frame lasts the mean of the others, 2.25 s, so moments are 1.875, 5.625 and 9.375 of 11.25 s
    assert taken(path, replace(VIDEO, num_frames=3)) == [(0.1, 1), (5.1, 3), (9.0, 4)]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 12), st.integers(0, 3), st.integers(1, 12), st.sampled_from(["mpeg4", "libx264"]), st.booleans())
def test_leaving_out_frames_between_moments_changes_nothing(tmp_path, key_every, between, count, codec, is_open):
    options = {"g": str(key_every), "bf": str(between)}
    if codec == "libx264":
        options["x264-params"] = f"open-gop={int(is_open)}:scenecut=0"
    path = write_film(tmp_path / "a.mkv", greys(12), codec=codec, options=options)
    with path.open("rb") as file:
        film = Film(file, "matroska", LIMITS, Budget(500, 20))
        start, end = film.span()
        moments = [start + (end - start) * Fraction(2 * i + 1, 2 * count) for i in range(count)]
        every = list(film.frames(()))
        some = list(film.frames(moments))
    assert len(every) == 12
    assert [when for when, _ in _shown_at(moments, iter(some))] == [when for when, _ in _shown_at(moments, iter(every))]
    values = {when: frame.to_ndarray().tobytes() for when, frame in every}
    assert all(values[when] == frame.to_ndarray().tobytes() for when, frame in _shown_at(moments, iter(some)))


def test_uniform_holds_no_more_than_two_whole_frames():
    made: list[weakref.ref[Image.Image]] = []

    def frames():
        for number in range(20):
            frame = Image.new("L", (4, 4), number)
            made.append(weakref.ref(frame))
            yield Fraction(number), frame

    most = 0
    for _ in _shown_at([Fraction(2 * number + 1, 2) for number in range(20)], frames()):
        most = max(most, sum(frame() is not None for frame in made))
    assert most <= 3  # the one shown, the next, and the one that frames() still names


def test_parts_without_a_moment_are_not_decoded(tmp_path):
    path = write_film(tmp_path / "a.mp4", greys(12) * 5, options={"g": "5", "bf": "0"})
    assert len(taken(path, replace(VIDEO, num_frames=2, max_frames=20))) == 2
    assert "more than data.max_video_frames=20 frames" in reason(path, replace(VIDEO, rule="scene", max_frames=20))


@pytest.mark.parametrize("rule", ["uniform", "scene"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_video_of_fewer_frames_gives_each_once(tmp_path, rule, count):
    path = write_film(tmp_path / "a.mp4", greys(count))
    assert taken(path, replace(VIDEO, num_frames=8, rule=rule)) == [(0.1 * i, i) for i in range(count)]


def test_scene_takes_the_first_frame_and_the_greatest_changes(tmp_path):
    shown = [BLACK] * 5 + [WHITE] * 4 + [(200, 200, 200)] * 3 + [BLACK] * 4 + [(40, 40, 40)]
    path = write_film(tmp_path / "a.mp4", plain(shown), options={"qp": "0"})
    times = [round(seconds, 3) for seconds, _ in read(path, replace(VIDEO, rule="scene", num_frames=3))]
    assert times == [0.0, 0.5, 1.2]  # changes: 255 at 0.5, 55 at 0.9, 200 at 1.2, 40 at 1.6


def test_scene_leaves_out_what_is_as_the_frame_before(tmp_path):
    path = write_animation(tmp_path / "a.gif", plain([RED, BLUE, RED]), [100, 100, 100])
    assert colours(path, replace(VIDEO, rule="scene", num_frames=8)) == [RED, BLUE, RED]
    still = write_film(tmp_path / "a.mp4", plain([RED] * 9), options={"qp": "0"})
    assert colours(still, replace(VIDEO, rule="scene")) == [RED]


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_animations_follow_the_times_of_their_frames(tmp_path, name):
    path = write_animation(tmp_path / name, plain([RED, GREEN, BLUE]), [100, 100, 800])
    assert colours(path) == [GREEN, BLUE]  # moments 0.125, 0.375, 0.625 and 0.875 of 1 s
    assert [seconds for seconds, _ in read(path)] == [0.1, 0.2]


def test_a_frame_without_a_delay_lasts_a_tenth_of_a_second(tmp_path):
    path = write_animation(tmp_path / "a.gif", plain([RED, GREEN, BLUE]), 0)
    assert [round(seconds, 3) for seconds, _ in read(path, replace(VIDEO, num_frames=3))] == [0.0, 0.1, 0.2]


def test_transparent_frames_lie_on_white(tmp_path):
    clear = Image.new("RGBA", (48, 32), (255, 0, 0, 0))
    path = write_animation(tmp_path / "a.webp", [Image.new("RGBA", (48, 32), (*BLUE, 255)), clear], 100)
    assert colours(path) == [BLUE, WHITE]


def test_rotation_is_applied(tmp_path):
    picture = Image.new("RGB", (48, 32), RED)
    picture.paste(BLUE, (0, 16, 48, 32))
    data = bytearray(write_film(tmp_path / "a.mp4", [picture] * 3).read_bytes())
    matrix = data.index(b"tkhd") + 44  # of the track header: a quarter turn clockwise, as telephones write it
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    (tmp_path / "b.mp4").write_bytes(data)
    _, turned = read(tmp_path / "b.mp4")[0]
    assert turned.size == (32, 48)
    assert [int(np.argmax(turned.getpixel((x, 24)))) for x in (4, 28)] == [2, 0]  # the top is at the right now


def test_frames_are_made_smaller_and_never_larger(tmp_path):
    path = write_film(tmp_path / "a.mp4", plain([RED] * 3, (192, 96)))
    assert read(path)[0][1].size == (64, 32)
    assert read(path, replace(VIDEO, side_px=500))[0][1].size == (192, 96)


def test_sound_beside_the_pictures_does_no_harm_and_alone_is_no_video(tmp_path):
    assert len(read(write_film(tmp_path / "a.mp4", greys(5), sound=True))) == 4
    with av.open(str(tmp_path / "b.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        for place in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 8000, 1024 * place
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert reason(tmp_path / "b.mp4") == "no picture in the video, only sound"


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html></html>",
        b"",
        PLAYLIST,
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        b"RIFF\0\0\0\0WAVEfmt ",
        b"\x47" * 188 * 4,
    ],
)
def test_what_is_no_video_is_refused_whatever_its_name(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    assert reason(tmp_path / "a.mp4").startswith("not a video that is read: mp4, mov")


def test_a_playlist_that_begins_as_a_video_opens_nothing(tmp_path):
    write_film(tmp_path / "secret.mp4", greys(3))
    for start in (b"#EXTftyp\n", b"\x1aE\xdf\xa3\n"):
        lines = PLAYLIST.replace(b"/etc/passwd", bytes(tmp_path / "secret.mp4"))
        (tmp_path / "a.mp4").write_bytes(start + lines)
        assert reason(tmp_path / "a.mp4").startswith(("not a readable video", "no video stream"))


def test_even_a_playlist_that_is_believed_gets_no_other_file(tmp_path):
    write_film(tmp_path / "secret.mp4", greys(3))
    playlist = PLAYLIST.replace(b"/etc/passwd", b"file:" + bytes(tmp_path / "secret.mp4"))
    with pytest.raises(PermissionError, match="the video asks for another file"):
        Film(io.BytesIO(playlist), "hls", LIMITS, Budget(500, 20)).span()


@pytest.mark.parametrize(("name", "codec", "options"), FILMS)
def test_a_file_that_was_cut_is_refused(tmp_path, name, codec, options):
    noise = [Image.effect_noise((48, 32), 80).convert("RGB") for _ in range(60)]
    data = write_film(tmp_path / name, noise, codec=codec, options=options).read_bytes()
    for share in (0.01, 0.5, 0.7):
        (tmp_path / name).write_bytes(data[: int(len(data) * share)])
        why = reason(tmp_path / name)
        assert why.startswith(("not a readable video", "not a video", "no "))
        assert "Errno" not in why


def test_a_file_cut_behind_its_index_is_refused(tmp_path):
    noise = [Image.effect_noise((48, 32), 80).convert("RGB") for _ in range(60)]
    plain_file = write_film(tmp_path / "a.mp4", noise)
    with (
        av.open(str(plain_file)) as old,
        av.open(str(tmp_path / "b.mp4"), "w", options={"movflags": "faststart"}) as new,
    ):
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    data = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(data[: int(len(data) * 0.7)])
    assert reason(tmp_path / "b.mp4").startswith("not a readable video")


def test_limits_are_named(tmp_path):
    path = write_film(tmp_path / "a.mp4", plain([RED] * 30, (192, 96)))
    for limits, text in (
        (replace(LIMITS, max_side=191), "192 x 96 pixels, a side longer than data.max_image_side_px=191"),
        (replace(LIMITS, max_pixels=18_000), "192 x 96 pixels, more than data.max_image_pixels=18000"),
        (replace(LIMITS, max_aspect=1.5), "192 x 96 pixels, a longer shape than data.max_aspect_ratio=1.5"),
    ):
        assert reason(path, limits=limits) == text
    size = path.stat().st_size
    assert (
        reason(path, replace(VIDEO, max_bytes=size - 1)) == f"{size} bytes, more than data.max_video_bytes={size - 1}"
    )
    assert reason(path, replace(VIDEO, max_seconds=2.5)) == "3 s long, more than data.max_video_s=2.5"
    assert "data.max_video_decode_s=1e-09 s of CPU time" in reason(path, replace(VIDEO, max_decode_s=1e-9))
    moving = write_animation(tmp_path / "a.gif", plain([RED, BLUE], (192, 96)), 100)
    assert "a side longer" in reason(moving, limits=replace(LIMITS, max_side=191))
    assert "data.max_video_frames=1 " in reason(moving, replace(VIDEO, max_frames=1))


def test_a_header_that_promises_huge_pictures_is_refused(tmp_path):
    data = write_film(tmp_path / "a.webm", plain([RED] * 3, (320, 240)), codec="libvpx").read_bytes()
    start = b"\x9d\x01\x2a"  # of a VP8 key frame's sizes
    assert data.count(start + b"\x40\x01\xf0\x00") == 1
    (tmp_path / "a.webm").write_bytes(data.replace(start + b"\x40\x01\xf0\x00", start + b"\xff\x3f\xff\x3f"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason(tmp_path / "a.webm").startswith("not a readable video")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB; it would take 400 MB


def test_a_codec_that_is_not_listed_is_refused(tmp_path):
    path = write_film(tmp_path / "a.mkv", plain([RED] * 3), codec="ffv1")
    assert reason(path).startswith("its codec is ffv1, not one of h264, hevc")


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("small")
    films = [write_film(folder / name, greys(4), codec=codec, options=options) for name, codec, options in FILMS]
    return [*(film.read_bytes() for film in films), write_animation(folder / "a.gif", greys(3), 100).read_bytes()]


@settings(max_examples=150)
@given(st.integers(0, 5), st.data())
def test_damaged_files_give_pictures_or_a_reason_and_nothing_else(small_files, which, data):
    content = bytearray(small_files[which])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        outcome = {picture.mode for _, picture in read_video(io.BytesIO(content), VIDEO, LIMITS)}
    except BadImage as error:
        outcome = str(error)
    assert outcome == {"RGB"} or (isinstance(outcome, str) and "\n" not in outcome)
