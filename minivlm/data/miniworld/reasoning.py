"""Questions of several steps answered as a chain of thought: count two or three groups, calculate."""

from random import Random

from minivlm.data.miniworld.questions import Question, count_of
from minivlm.data.miniworld.scene import COLOURS, Scene

PROMPT = "Think step by step and end with 'Final answer: ..'."
DIRECT_PROMPT = "Answer the question using a single word or phrase."
"""As LLaVA asks for short answers (arXiv:2310.03744)."""

MAX_POINTS = 7


def ask_reasoning(scene: Scene, random: Random, *, naming_fraction: float) -> Question:
    """The points that the shapes of three colours give together, or how many more there are of one than another.

    The chain of thought counts, then calculates; a share `naming_fraction` of them names every shape in reading order
    first. Neither way is marked as the better one: which leads to more right answers is for the preference stage to
    find.
    """
    asks_points = random.random() < 0.5
    names = _draw_colours(scene, random, 3 if asks_points else 2)
    counts = [count_of(scene, name) for name in names]
    if asks_points:
        points = [random.randint(1, MAX_POINTS) for _ in names]
        values = [f"each {name} one {value}" for name, value in zip(names, points, strict=True)]
        text = f"Each {names[0]} shape gives {points[0]} points, {', '.join(values[1:])}. How many in all?"
        products = [count * value for count, value in zip(counts, points, strict=True)]
        steps = [f"{n}x{v}={p}" for n, v, p in zip(counts, points, products, strict=True)]
        total = products[0]
        for product in products[1:]:
            steps.append(f"{total}+{product}={total + product}")
            total += product
    else:
        if counts[0] < counts[1]:
            names, counts = names[::-1], counts[::-1]
        text = f"How many more {names[0]} than {names[1]} shapes are there?"
        total = counts[0] - counts[1]
        steps = [f"{counts[0]}-{counts[1]}={total}"]
    lines = [", ".join(f"{name}{n}" for name, n in zip(names, counts, strict=True)), *steps]
    if random.random() < naming_fraction:
        shapes = ", ".join(f"{s.colour} {s.shape}" for s in scene.shapes)
        lines.insert(0, f"Find {' and '.join(names)}: {shapes}")
    response = "\n".join([*lines, f"Final answer: {total}"])
    return Question("reasoning", f"{text} {PROMPT}", str(total), response)


def ask_directly(question: Question) -> Question:
    """The same reasoning question with the number alone as answer."""
    text = f"{question.text.removesuffix(PROMPT).rstrip()}\n{DIRECT_PROMPT}"
    return Question(question.task, text, question.answer, question.answer)


def _draw_colours(scene: Scene, random: Random, number: int) -> list[str]:
    """Different colours, the first present and the others mostly."""
    present = sorted({s.colour for s in scene.shapes})
    names = [random.choice(present)]
    while len(names) < number:
        rest = [name for name in COLOURS if name not in names]
        seen = [name for name in rest if name in present]
        names.append(random.choice(seen if seen and random.random() < 0.8 else rest))
    return names
