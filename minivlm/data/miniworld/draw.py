"""Scenes to pictures, with Pillow. A cell is a third of the side, so cells and 24 px patches coincide at 72 px."""

from functools import cache

from PIL import Image, ImageDraw, ImageFont

from minivlm.data.miniworld.scene import GRID, Scene

_RGB = {
    "red": (222, 36, 36),
    "green": (30, 150, 50),
    "blue": (40, 80, 230),
    "yellow": (245, 215, 20),
}
_BACKGROUNDS = ((255, 255, 255), (232, 232, 236), (214, 226, 236), (236, 226, 212), (218, 232, 216), (236, 218, 226))
_INK = (0, 0, 0)
_RADIUS = {"small": 0.34, "large": 0.46}
_OUTLINE = 0.08
"""Width of the outline, in cells."""

_HOLE = 0.42
"""Hole of a ring, in radii."""

_ARM = 0.42
"""Half the width of a cross's arms, in radii."""

_SUPERSAMPLING = 4


def draw_picture(scene: Scene, size_px: int) -> Image.Image:
    """The scene as a square RGB picture of `size_px` a side (a multiple of 3)."""
    cell_px = size_px // GRID
    background = _BACKGROUNDS[scene.background]
    picture = Image.new("RGB", (size_px, size_px), background)
    for shape in scene.shapes:
        outline, filling = _shape_masks(shape.shape, _RADIUS[shape.size], cell_px)
        shift_px = [round(part * size_px / 64) for part in shape.shift]
        corner = (shape.column * cell_px + shift_px[0], shape.row * cell_px + shift_px[1])
        picture.paste(_INK, corner, outline)
        picture.paste(_RGB[shape.colour], corner, filling)
    for offset, character in enumerate(scene.code):
        cell = scene.code_cell + offset
        picture.paste(_INK, (cell % GRID * cell_px, cell // GRID * cell_px), _glyph_mask(character, cell_px))
    return picture


@cache
def _shape_masks(shape: str, radius: float, cell_px: int) -> tuple[Image.Image, Image.Image]:
    """Grey masks [cell, cell] of a shape in the middle of its cell: with its dark outline, and of the colour inside.

    `radius` in cells. The outline shows the form in the same way whatever the colour.
    """
    side = cell_px * _SUPERSAMPLING
    return tuple(
        _draw_shape(shape, radius * side, edge * side, side).resize((cell_px, cell_px), Image.Resampling.BOX)
        for edge in (0.0, _OUTLINE)
    )  # type: ignore[return-value]


def _draw_shape(shape: str, radius: float, edge: float, side: int) -> Image.Image:
    """[side, side] mask of a shape, `edge` pixels narrower than its outline."""
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    middle = side / 2

    def box(across: float, down: float) -> tuple[float, float, float, float]:
        return (middle - across, middle - down, middle + across, middle + down)

    if shape == "ring":
        pen.ellipse(box(radius - edge, radius - edge), fill=255)
        pen.ellipse(box(radius * _HOLE + edge, radius * _HOLE + edge), fill=0)
    elif shape == "square":
        pen.rectangle(box(radius * 0.88 - edge, radius * 0.88 - edge), fill=255)
    elif shape == "cross":
        pen.rectangle(box(radius - edge, radius * _ARM - edge), fill=255)
        pen.rectangle(box(radius * _ARM - edge, radius - edge), fill=255)
    else:
        top, bottom = middle - radius + 2 * edge, middle + radius * 0.8 - edge
        reach = (bottom - top) / 1.8
        pen.polygon([(middle, top), (middle + reach, bottom), (middle - reach, bottom)], fill=255)
    return mask


@cache
def _glyph_mask(character: str, cell_px: int) -> Image.Image:
    """[cell, cell] grey mask of one printed character in the middle of its cell (Pillow's own font)."""
    mask = Image.new("L", (cell_px, cell_px), 0)
    font = ImageFont.load_default(size=cell_px)
    ImageDraw.Draw(mask).text((cell_px / 2, cell_px / 2), character, fill=255, font=font, anchor="mm")
    return mask
