"""A folder of pictures for each colour and form, one shape in a picture: known truth for zero-shot classification.

No scene of the data set has fewer than two shapes, so none of these was trained on.
"""

from pathlib import Path
from random import Random

from minivlm.data.miniworld.draw import draw_picture
from minivlm.data.miniworld.scene import COLOURS, GRID, NUM_BACKGROUNDS, SHAPES, SIZES, Scene, Shape, draw_shape

TEMPLATES = tuple(f"{column}{row} {size} {{}}" for row in range(1, GRID + 1) for column in "abc" for size in SIZES)
"""Every caption of one shape but for what it is: `a1 small {}`."""


def draw_classes(folder: Path, *, seed: int, per_class: int, image_size_px: int) -> None:
    """Write COLOUR_FORM/NUMBER.png, all different: cell, size, place in the cell and background are drawn at random.

    Args:
        per_class: pictures of each class; there are 972 scenes of one.
    """
    for colour in COLOURS:
        for form in SHAPES:
            place = folder / f"{colour}_{form}"
            place.mkdir(parents=True)
            random = Random(f"{seed} {colour} {form}")
            scenes: dict[Scene, None] = {}
            while len(scenes) < per_class:
                drawn = draw_shape(random, random.randrange(GRID * GRID))
                shape = Shape(drawn.cell, drawn.size, colour, form, drawn.shift)
                scenes[Scene((shape,), background=random.randrange(NUM_BACKGROUNDS))] = None
            for number, scene in enumerate(scenes):
                draw_picture(scene, image_size_px).save(place / f"{number:03d}.png", compress_level=1)
