"""Scenes to pictures, with Pillow. A cell is a quarter of the side, so cells and 16 px patches coincide at 64 px."""

import math
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from minivlm.data.miniworld.scene import GRID, Scene

_RGB = {
    "red": (222, 36, 36),
    "green": (30, 150, 50),
    "blue": (40, 80, 230),
    "yellow": (245, 215, 20),
    "purple": (145, 40, 175),
    "orange": (250, 135, 20),
}
_BACKGROUNDS = ((255, 255, 255), (232, 232, 236), (214, 226, 236), (236, 226, 212), (218, 232, 216), (236, 218, 226))
_INK = (0, 0, 0)
_RADIUS = {"small": 0.27, "large": 0.44}
_SUPERSAMPLING = 4


def draw_picture(scene: Scene, size_px: int) -> Image.Image:
    """The scene as a square RGB picture of `size_px` a side (a multiple of 4)."""
    cell_px = size_px // GRID
    background = _BACKGROUNDS[scene.background]
    picture = Image.new("RGB", (size_px, size_px), background)
    for shape in scene.shapes:
        mask = _shape_mask(shape.shape, shape.size, cell_px)
        shift_px = [round(part * size_px / 64) for part in shape.shift]
        corner = (shape.column * cell_px + shift_px[0], shape.row * cell_px + shift_px[1])
        picture.paste(_RGB[shape.colour], corner, mask)
    for offset, character in enumerate(scene.code):
        cell = scene.code_cell + offset
        picture.paste(_INK, (cell % GRID * cell_px, cell // GRID * cell_px), _glyph_mask(character, cell_px))
    return picture


@cache
def _shape_mask(shape: str, size: str, cell_px: int) -> Image.Image:
    """[cell, cell] grey mask of a shape in the middle of its cell."""
    side = cell_px * _SUPERSAMPLING
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    middle, radius = side / 2, _RADIUS[size] * side
    box = (middle - radius, middle - radius, middle + radius, middle + radius)
    if shape == "circle":
        pen.ellipse(box, fill=255)
    elif shape == "ring":
        pen.ellipse(box, fill=255)
        hole = radius * 0.5
        pen.ellipse((middle - hole, middle - hole, middle + hole, middle + hole), fill=0)
    elif shape == "square":
        inner = radius * 0.9
        pen.rectangle((middle - inner, middle - inner, middle + inner, middle + inner), fill=255)
    elif shape == "cross":
        arm = radius * 0.34
        pen.rectangle((middle - radius, middle - arm, middle + radius, middle + arm), fill=255)
        pen.rectangle((middle - arm, middle - radius, middle + arm, middle + radius), fill=255)
    elif shape == "triangle":
        pen.polygon([(middle, box[1]), (box[2], box[3]), (box[0], box[3])], fill=255)
    else:
        pen.polygon(_star(middle, radius), fill=255)
    return mask.resize((cell_px, cell_px), Image.Resampling.BOX)


def _star(middle: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a five-pointed star."""
    corners = []
    for i in range(10):
        reach = radius * (1.08 if i % 2 == 0 else 0.42)
        angle = math.pi * (i / 5 - 0.5)
        corners.append((middle + reach * math.cos(angle), middle + reach * math.sin(angle)))
    return corners


@cache
def _glyph_mask(character: str, cell_px: int) -> Image.Image:
    """[cell, cell] grey mask of one printed character in the middle of its cell (Pillow's own font)."""
    mask = Image.new("L", (cell_px, cell_px), 0)
    font = ImageFont.load_default(size=cell_px)
    ImageDraw.Draw(mask).text((cell_px / 2, cell_px / 2), character, fill=255, font=font, anchor="mm")
    return mask
