"""Two-step questions answered as a chain of thought: list the shapes of two groups, count, calculate."""

from random import Random

from minivlm.data.miniworld.questions import Question, plural_of
from minivlm.data.miniworld.scene import COLOURS, SHAPES, SIZES, Scene

PROMPT = "Think step by step."
MAX_POINTS = 3


def ask_reasoning(scene: Scene, random: Random) -> Question:
    """Either the points that two groups of shapes give together, or how many more there are of one than of the other.

    Groups are all shapes of one form, colour or size. At least one of the two is in the picture.
    """
    first, second = _draw_groups(scene, random)
    places = [_places(scene, name) for name in (first, second)]
    counts = [len(cells) for cells in places]
    if random.random() < 0.5:
        points = [random.randint(1, MAX_POINTS) for _ in range(2)]
        text = (
            f"Each {_singular(first)} gives {points[0]} points, each {_singular(second)} {points[1]}. How many in all?"
        )
        products = [count * value for count, value in zip(counts, points, strict=True)]
        steps = [f"{n}x{v}={p}" for n, v, p in zip(counts, points, products, strict=True)]
        total = sum(products)
        last = f"{products[0]}+{products[1]}={total}"
    else:
        if counts[0] < counts[1]:
            first, second, places, counts = second, first, places[::-1], counts[::-1]
        text = f"How many more {_plural(first)} than {_plural(second)} are there?"
        steps = [str(count) for count in counts]
        total = counts[0] - counts[1]
        last = f"{counts[0]}-{counts[1]}={total}"
    lines = [f"{name}: {' '.join(cells) or 'none'}\n{step}"
             for name, cells, step in zip((first, second), places, steps, strict=True)]  # fmt: skip
    response = "\n".join([*lines, last, f"Final answer: {total}"])
    return Question("reasoning", f"{text} {PROMPT}", str(total), response)


def _draw_groups(scene: Scene, random: Random) -> tuple[str, str]:
    """Two different names of groups, present ones much more often than absent ones."""
    present = sorted({name for s in scene.shapes for name in (s.colour, s.shape)})
    first = random.choice(present)
    names = present if random.random() < 0.8 else list(COLOURS + SHAPES + SIZES)
    second = random.choice([name for name in names if name != first])
    return first, second


def _places(scene: Scene, name: str) -> list[str]:
    return [s.place for s in scene.shapes if name in (s.colour, s.shape, s.size)]


def _singular(name: str) -> str:
    return name if name in SHAPES else f"{name} shape"


def _plural(name: str) -> str:
    return plural_of(name) if name in SHAPES else f"{name} shapes"
