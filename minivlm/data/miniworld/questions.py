"""Captions and the direct questions about one picture, in English and Chinese, with their true answers."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from minivlm.data.miniworld.scene import COLOURS, SHAPES, Scene, Shape

CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色",
    "ring": "圆环", "square": "方形", "triangle": "三角形", "cross": "十字",
    "small": "小", "large": "大", "yes": "有", "no": "没有",
    "left": "左边", "right": "右边", "above": "上面", "below": "下面",
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question and its answer. `answer` is the short truth; `response` what the model is taught to say."""

    task: str
    text: str
    answer: str
    response: str
    language: str = "en"


def caption(scene: Scene, random: Random, language: str) -> Question:
    """Name every shape in reading order with its cell, then the printed code."""
    if language == "zh":
        text = random.choice(("描述这张图片。", "图中有什么？"))
        parts = [f"{s.place}{CHINESE[s.size]}{CHINESE[s.colour]}{CHINESE[s.shape]}" for s in scene.shapes]
        answer = "，".join(parts + ([f"文字{scene.code}"] if scene.code else []))
    else:
        text = random.choice(("Describe the picture.", "What is in the picture?"))
        parts = [f"{describe(s)} at {s.place}" for s in scene.shapes]
        answer = ", ".join(parts + ([f"text {scene.code}"] if scene.code else []))
    return Question("caption", text, answer, answer, language)


def describe(shape: Shape) -> str:
    """`large red ring`."""
    return f"{shape.size} {shape.colour} {shape.shape}"


def ask_colour(scene: Scene, random: Random, language: str, want_yes: bool) -> Question | None:
    """Colour of the only shape of its form; None where every form occurs twice."""
    forms = Counter(s.shape for s in scene.shapes)
    candidates = [s for s in scene.shapes if forms[s.shape] == 1]
    if not candidates:
        return None
    shape = random.choice(candidates)
    if language == "zh":
        return _question("colour", f"{CHINESE[shape.shape]}是什么颜色？", shape.colour, language)
    return _question("colour", f"What color is the {shape.shape}?", shape.colour, language)


def ask_shape(scene: Scene, random: Random, language: str, want_yes: bool) -> Question | None:
    """Form of the only shape of its colour; None where every colour occurs twice."""
    colours = Counter(s.colour for s in scene.shapes)
    candidates = [s for s in scene.shapes if colours[s.colour] == 1]
    if not candidates:
        return None
    shape = random.choice(candidates)
    if language == "zh":
        return _question("shape", f"{CHINESE[shape.colour]}的是什么形状？", shape.shape, language)
    return _question("shape", f"What shape is {shape.colour}?", shape.shape, language)


def ask_count(scene: Scene, random: Random, language: str, want_yes: bool) -> Question | None:
    """How many shapes have one colour or one form. The count is drawn first, larger ones more often than they occur."""
    names: dict[int, list[str]] = {}
    for name in COLOURS + SHAPES:
        names.setdefault(sum(name in (s.colour, s.shape) for s in scene.shapes), []).append(name)
    counts = sorted(names)
    count = random.choices(counts, [1 + 2 * c for c in counts])[0]
    name = random.choice(names[count])
    if language == "zh":
        return _question("count", f"有几个{CHINESE[name]}？", str(count), language)
    plural = f"{name} shapes" if name in COLOURS else plural_of(name)
    return _question("count", f"How many {plural} are there?", str(count), language)


def ask_existence(scene: Scene, random: Random, language: str, want_yes: bool) -> Question | None:
    """Whether a colour and a form occur in one shape. Half of the absent ones have their parts in two shapes."""
    present = {(s.colour, s.shape) for s in scene.shapes}
    mixed = [(a.colour, b.shape) for a in scene.shapes for b in scene.shapes if (a.colour, b.shape) not in present]
    absent = [(c, f) for c in COLOURS for f in SHAPES if (c, f) not in present]
    if want_yes:
        colour, form = random.choice(sorted(present))
    else:
        colour, form = random.choice(mixed if mixed and random.random() < 0.5 else absent)
    answer = "yes" if want_yes else "no"
    if language == "zh":
        return _question("existence", f"有{CHINESE[colour]}{CHINESE[form]}吗？", answer, language)
    return _question("existence", f"Is there a {colour} {form}?", answer, language)


def ask_relation(scene: Scene, random: Random, language: str, want_yes: bool) -> Question | None:
    """On which side of one shape another lies; None where no two shapes can be named and told apart on an axis."""
    kinds = Counter((s.colour, s.shape) for s in scene.shapes)
    named = [s for s in scene.shapes if kinds[(s.colour, s.shape)] == 1]
    axis = random.choice(("column", "row"))
    pairs = [(a, b) for a in named for b in named if _along(a, axis) != _along(b, axis)]
    if not pairs:
        return None
    first, second = random.choice(pairs)
    low, high = ("left", "right") if axis == "column" else ("above", "below")
    answer = low if _along(first, axis) < _along(second, axis) else high
    if language == "zh":
        names = [CHINESE[s.colour] + CHINESE[s.shape] for s in (first, second)]
        return _question("relation", f"{names[0]}在{names[1]}的{CHINESE[low]}还是{CHINESE[high]}？", answer, language)
    text = f"Is the {first.colour} {first.shape} {_or(low, high)} the {second.colour} {second.shape}?"
    return _question("relation", text, answer, language)


def ask_ocr(scene: Scene, random: Random, language: str, want_yes: bool) -> Question | None:
    """The printed code; None where there is none."""
    if not scene.code:
        return None
    text = "写着什么？" if language == "zh" else "What text is written?"
    return Question("ocr", text, scene.code, scene.code, language)


ASK: dict[str, Callable[[Scene, Random, str, bool], Question | None]] = {
    "colour": ask_colour,
    "shape": ask_shape,
    "count": ask_count,
    "existence": ask_existence,
    "relation": ask_relation,
    "ocr": ask_ocr,
}


def plural_of(form: str) -> str:
    """`rings`, `crosses`."""
    return f"{form}es" if form.endswith("s") else f"{form}s"


def _question(task: str, text: str, answer: str, language: str) -> Question:
    answer = CHINESE.get(answer, answer) if language == "zh" else answer
    return Question(task, text, answer, answer, language)


def _along(shape: Shape, axis: str) -> int:
    return shape.column if axis == "column" else shape.row


def _or(low: str, high: str) -> str:
    return "left or right of" if low == "left" else "above or below"
