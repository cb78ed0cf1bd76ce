"""Two-step questions answered as a chain of thought: count two groups, calculate."""

from random import Random

from minivlm.data.miniworld.questions import Question, count_of
from minivlm.data.miniworld.scene import COLOURS, Scene

PROMPT = "Think step by step and end with 'Final answer: ..'."
MAX_POINTS = 5
FIND_SHARE = 0.5
"""Share of answers that name every shape before they count."""


def ask_reasoning(scene: Scene, random: Random) -> Question:
    """The points that the shapes of two colours give together, or how many more there are of one than the other.

    The chain of thought counts, then calculates; half of them name every shape in reading order first. Neither way is
    marked as the better one: which leads to more right answers is for the preference stage to find.
    """
    first, second = _draw_colours(scene, random)
    counts = [count_of(scene, name) for name in (first, second)]
    if random.random() < 0.5:
        points = [random.randint(1, MAX_POINTS) for _ in range(2)]
        text = f"Each {first} shape gives {points[0]} points, each {second} one {points[1]}. How many in all?"
        products = [count * value for count, value in zip(counts, points, strict=True)]
        total = sum(products)
        steps = [f"{n}x{v}={p}" for n, v, p in zip(counts, points, products, strict=True)]
        steps.append(f"{products[0]}+{products[1]}={total}")
    else:
        if counts[0] < counts[1]:
            first, second, counts = second, first, counts[::-1]
        text = f"How many more {first} than {second} shapes are there?"
        total = counts[0] - counts[1]
        steps = [f"{counts[0]}-{counts[1]}={total}"]
    lines = [", ".join(f"{name}{n}" for name, n in zip((first, second), counts, strict=True)), *steps]
    if random.random() < FIND_SHARE:
        shapes = ", ".join(f"{s.colour} {s.shape}" for s in scene.shapes)
        lines.insert(0, f"Find {first} and {second}: {shapes}")
    response = "\n".join([*lines, f"Final answer: {total}"])
    return Question("reasoning", f"{text} {PROMPT}", str(total), response)


def _draw_colours(scene: Scene, random: Random) -> tuple[str, str]:
    """Two different colours, the first present and the second mostly."""
    present = sorted({s.colour for s in scene.shapes})
    first = random.choice(present)
    names = present if random.random() < 0.8 and len(present) > 1 else list(COLOURS)
    second = random.choice([name for name in names if name != first])
    return first, second
