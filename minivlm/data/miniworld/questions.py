"""Captions and the direct questions about one picture, in English and Chinese, with their true answers."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from minivlm.data.miniworld.scene import COLOURS, Scene, Shape

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


def list_shapes(scene: Scene, random: Random) -> Question:
    """Form, then colour, of every shape in reading order: the caption's other way round."""
    parts = [f"{s.shape} {s.colour}" for s in scene.shapes]
    answer = ", ".join(parts + ([f"text {scene.code}"] if scene.code else []))
    return Question("list", "List the shapes.", answer, answer)


def count_all(scene: Scene, random: Random) -> Question:
    """How many shapes there are of each colour, in any order."""
    names = random.sample(COLOURS, len(COLOURS))
    answer = ", ".join(f"{name}{count_of(scene, name)}" for name in names)
    return Question("tally", "Count the colors.", answer, answer)


def locate_all(scene: Scene, random: Random) -> Question:
    """Every shape in reading order: its colour, and on which side of the centre it lies across and down."""
    parts = [f"{s.colour} {_side(s.column, 'left', 'right')} {_side(s.row, 'above', 'below')}" for s in scene.shapes]
    answer = ", ".join(parts)
    return Question("places", "Where are the shapes?", answer, answer)


def count_of(scene: Scene, name: str) -> int:
    """How many shapes have the colour `name`."""
    return sum(s.colour == name for s in scene.shapes)


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
    """How many shapes have one colour. The count is drawn first, each that occurs as often as another."""
    names: dict[int, list[str]] = {}
    for name in COLOURS:
        names.setdefault(count_of(scene, name), []).append(name)
    count = random.choice(sorted(names))
    name = random.choice(names[count])
    text = f"有几个{CHINESE[name]}的？" if language == "zh" else f"How many {name} shapes are there?"
    return _question("count", text, str(count), language)


def ask_existence(scene: Scene, random: Random, language: str, want_yes: bool) -> Question | None:
    """Whether a colour occurs; None where yes is wanted and no colour does, or no is wanted and all do."""
    names = [name for name in COLOURS if (count_of(scene, name) > 0) == want_yes]
    if not names:
        return None
    name = random.choice(names)
    text = f"有{CHINESE[name]}的吗？" if language == "zh" else f"Is there a {name} shape?"
    return _question("existence", text, "yes" if want_yes else "no", language)


def ask_relation(scene: Scene, random: Random, language: str, want_yes: bool) -> Question | None:
    """On which side of the centre the only shape of its colour lies; None where no such shape is beside it."""
    colours = Counter(s.colour for s in scene.shapes)
    words = random.choice((("left", "right"), ("above", "below")))
    sides = [(s.colour, _side(s.column if words[0] == "left" else s.row, *words)) for s in scene.shapes]
    candidates = [(colour, side) for colour, side in sides if colours[colour] == 1 and side in words]
    if not candidates:
        return None
    colour, side = random.choice(candidates)
    if language == "zh":
        text = f"{CHINESE[colour]}的在中心的{CHINESE[words[0]]}还是{CHINESE[words[1]]}？"
    else:
        text = f"Is the {colour} shape {words[0]} or {words[1]}{' of' if words[0] == 'left' else ''} the center?"
    return _question("relation", text, side, language)


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


def _question(task: str, text: str, answer: str, language: str) -> Question:
    answer = CHINESE.get(answer, answer) if language == "zh" else answer
    return Question(task, text, answer, answer, language)


def _side(place: int, low: str, high: str) -> str:
    """`low` or `high` of the middle column or row, or `middle`."""
    return (low, "middle", high)[place]
