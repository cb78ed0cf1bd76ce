"""Pictures from outside: limits before decoding, any mode to RGB, no path leaves the root, no crash on rubbish."""

import hashlib
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minivlm.data.images import BadImage, ImageLimits, open_image, read_image, resolve_image

LIMITS = ImageLimits(max_bytes=100_000, max_pixels=10_000, max_side=400, max_aspect=20.0)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """One part of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises a huge picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 99))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def sixteen_bit_png(values: np.ndarray, colour_type: int) -> bytes:
    """One pixel; Pillow itself writes no 16-bit colours."""
    header = struct.pack(">IIBBBBB", 1, 1, 16, colour_type, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + values.tobytes()))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_each_format_opens_whatever_its_name(kind):
    picture = open_image(encode(Image.new("RGB", (20, 10), (255, 0, 0)), kind), LIMITS)
    assert (picture.mode, picture.size) == ("RGB", (20, 10))
    assert np.abs(np.asarray(picture)[5, 10].astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<!DOCTYPE html><html></html>", "not a readable picture"),
        (b"", "not a readable picture"),
        (encode(Image.effect_noise((64, 64), 50), "JPEG")[:500], "not a readable picture .*truncated"),
        (b"\0" * 100_001, "100001 bytes, more than data.max_image_bytes=100000"),
        (encode(Image.new("RGB", (101, 100))), "101 x 100 pixels, more than data.max_image_pixels=10000"),
        (encode(Image.new("RGB", (401, 20))), "401 x 20 pixels, a side longer than data.max_image_side_px=400"),
        (encode(Image.new("RGB", (1, 21))), "1 x 21 pixels, a longer shape than data.max_aspect_ratio=20"),
        (png_that_claims(50_000, 50_000), "not a readable picture .*|a side longer"),
        (png_that_claims(9000, 9000), "a side longer than"),
        (encode(Image.new("RGB", (8, 8)), "TIFF"), "not a readable picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable picture"),
    ],
)
def test_bad_pictures_are_refused_with_the_reason(data, reason):
    with pytest.raises(BadImage, match=reason):
        open_image(data, LIMITS)


@settings(max_examples=150)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]), st.data())
def test_damaged_files_give_a_picture_or_a_reason_and_nothing_else(kind, data):
    encoded = bytearray(encode(Image.new("P", (9, 7)).convert("RGB"), kind))
    for place in data.draw(st.lists(st.integers(0, len(encoded) - 1), max_size=6)):
        encoded[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(encoded)))
    try:
        outcome = open_image(bytes(encoded[:cut]), LIMITS).mode
    except BadImage as error:
        outcome = str(error)
    assert outcome == "RGB" or (outcome.startswith("not a readable picture") or " pixels" in outcome)
    assert "\n" not in outcome


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees
    assert open_image(encode(Image.new("RGB", (20, 10)), "JPEG", exif=exif), LIMITS).size == (10, 20)


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(encode(clear), LIMITS).getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    deep = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert open_image(encode(deep), LIMITS).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK"])
def test_other_modes_become_rgb(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    white = Image.new("RGB", (4, 4), "white").convert(mode)
    assert open_image(encode(white, kind), LIMITS).getpixel((1, 1)) == (255, 255, 255)


def test_cmyk_keeps_its_colours():
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    picture = open_image(encode(cyan, "JPEG", quality=95), LIMITS)
    assert np.abs(np.asarray(picture)[4, 4].astype(int) - [0, 255, 255]).max() <= 6


def test_a_palette_with_a_clear_entry_lies_on_white():
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 1), 1)
    opened = open_image(encode(picture, "PNG", transparency=0), LIMITS)
    assert [opened.getpixel((0, 0)), opened.getpixel((1, 1))] == [(255, 255, 255), (0, 0, 255)]


@pytest.mark.parametrize(("channels", "colour_type"), [(3, 2), (4, 6)])
def test_sixteen_bit_colour_keeps_the_upper_eight(channels, colour_type):
    values = np.array([0x8000, 0x40FF, 0xFFFF, 0xFFFF][:channels], ">u2")
    assert open_image(sixteen_bit_png(values, colour_type), LIMITS).getpixel((0, 0)) == (128, 64, 255)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data, LIMITS).getpixel((0, 0)) == (255, 0, 0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.png").write_bytes(b"x")
    (tmp_path / "root_evil").mkdir()
    (tmp_path / "root_evil" / "b.png").write_bytes(b"x")
    (folder / "link.png").symlink_to(tmp_path / "root_evil" / "b.png")
    return folder


def test_a_name_inside_the_root_resolves(root):
    assert resolve_image(root, "sub/a.png") == root / "sub" / "a.png"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../../etc/passwd", "leaves the image root"),
        ("..\\secret.png", "leaves the image root"),
        ("../root_evil/b.png", "leaves the image root"),
        ("sub/../sub/a.png", "leaves the image root"),
        ("/etc/passwd", "not relative"),
        ("\\\\server\\share.png", "not relative"),
        ("C:\\a.png", "not relative"),
        ("~/a.png", "not relative"),
        ("https://example.org/a.png", "not relative"),
        ("data:image/png;base64,AAAA", "not relative"),
        ("link.png", "leaves the image root through a link"),
        ("a\0.png", "not a file name"),
        ("", "not a file name"),
        ("nothing.png", "no file 'nothing.png'"),
        ("sub", "not a file"),
        ("x" * 5000, "no file"),
    ],
)
def test_other_names_are_refused(root, name, reason):
    with pytest.raises(BadImage, match=reason):
        resolve_image(root, name)


def test_reading_digests_the_bytes(tmp_path):
    path = tmp_path / "a.bmp"
    Image.new("RGB", (1, 1)).save(path)
    picture, digest = read_image(path, LIMITS)
    assert picture.size == (1, 1)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
