"""Captions and the direct questions about one picture, in English and Chinese, with their true answers."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from minivlm.data.miniworld.scene import COLOURS, Scene

CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色",
    "ring": "圆环", "square": "方形", "triangle": "三角形", "cross": "十字",
    "small": "小", "large": "大", "yes": "有", "no": "没有", "text": "文字",
    "left": "左边", "right": "右边", "top": "上面", "bottom": "下面", "middle": "中间",
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
        parts = [s.cell_name + _phrase([s.size, s.colour, s.shape], language) for s in scene.shapes]
    else:
        text = random.choice(("Describe the picture.", "What is in the picture?"))
        parts = [f"{s.cell_name} {s.size} {s.colour} {s.shape}" for s in scene.shapes]
    code = [_phrase(["text", scene.code], language)] if scene.code else []
    return _told("caption", text, parts + code, language)


def colours_of(scene: Scene, random: Random, language: str) -> Question | None:
    """Colour of every form that occurs once, in the order in which the question names them; None without any."""
    colours = {s.shape: s.colour for s in scene.shapes}
    forms = _singles([s.shape for s in scene.shapes], random)
    text = "这些是什么颜色：" if language == "zh" else "What colors are these: "
    return _listed("colours", text, {form: colours[form] for form in forms}, language)


def sides_of(scene: Scene, random: Random, language: str) -> Question | None:
    """Side, across or down, of every colour that occurs once, in the order of the question; None without any."""
    across = random.random() < 0.5
    sides = {s.colour: s.place[across] for s in scene.shapes}
    names = _singles([s.colour for s in scene.shapes], random)
    if language == "zh":
        text = "左边还是右边：" if across else "上面还是下面："
    else:
        text = "Left or right: " if across else "Top or bottom: "
    return _listed("sides", text, {name: sides[name] for name in names}, language)


def counts_of(scene: Scene, random: Random, language: str) -> Question | None:
    """How many shapes there are of each colour, in the order in which the question names them."""
    names = random.sample(COLOURS, len(COLOURS))
    text = "这些各有几个：" if language == "zh" else "How many are these: "
    return _listed("counts", text, {name: str(count_of(scene, name)) for name in names}, language)


def count_of(scene: Scene, name: str) -> int:
    """How many shapes have the colour `name`."""
    return sum(s.colour == name for s in scene.shapes)


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
    """On which side of the picture the only shape of its colour lies; None where no such shape is on a side."""
    colours = Counter(s.colour for s in scene.shapes)
    words = random.choice((("left", "right"), ("top", "bottom")))
    sides = [(s.colour, s.place[words[0] == "left"]) for s in scene.shapes]
    candidates = [(colour, side) for colour, side in sides if colours[colour] == 1 and side in words]
    if not candidates:
        return None
    colour, side = random.choice(candidates)
    if language == "zh":
        return _question(
            "relation", f"{CHINESE[colour]}的在{CHINESE[words[0]]}还是{CHINESE[words[1]]}？", side, language
        )
    return _question("relation", f"Is the {colour} shape at the {words[0]} or the {words[1]}?", side, language)


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


def _told(task: str, text: str, parts: list[str], language: str) -> Question:
    answer = ("，" if language == "zh" else ", ").join(parts)
    return Question(task, text, answer, answer, language)


def _listed(task: str, text: str, facts: dict[str, str], language: str) -> Question | None:
    """Names in the question, each with its fact in the answer: `ring red`, but `red2`."""
    if not facts:
        return None
    comma, end = ("，", "？") if language == "zh" else (", ", "?")
    text += comma.join(_phrase([name], language) for name in facts) + end
    parts = [name + fact if fact.isdigit() else f"{name} {fact}" for name, fact in facts.items()]
    if language == "zh":
        parts = [_phrase([name, fact], language) for name, fact in facts.items()]
    return _told(task, text, parts, language)


def _phrase(words: list[str], language: str) -> str:
    """`red ring`."""
    return "".join(CHINESE.get(word, word) for word in words) if language == "zh" else " ".join(words)


def _singles(names: list[str], random: Random) -> list[str]:
    """Those that occur once, in any order."""
    singles = sorted(name for name, count in Counter(names).items() if count == 1)
    return random.sample(singles, len(singles))
