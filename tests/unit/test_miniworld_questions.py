"""Questions about one hand-made scene, whose answers can be read off it."""

import re
from random import Random

import pytest

from minivlm.data.miniworld.questions import ASK, caption, colours_of, counts_of, sides_of
from minivlm.data.miniworld.reasoning import ask_reasoning
from minivlm.data.miniworld.scene import Scene, Shape, draw_scene

SCENE = Scene(
    (Shape(0, "large", "red", "ring"), Shape(4, "small", "blue", "cross"), Shape(5, "small", "red", "cross")),
    code="K7",
    code_cell=6,
)


def ask_often(task: str, language: str = "en", want_yes: bool = True) -> dict[str, str]:
    """Every question of a task that 200 draws bring, with its answer."""
    asked = [ASK[task](SCENE, Random(seed), language, want_yes) for seed in range(200)]
    return {question.text: question.answer for question in asked}


def test_the_caption_names_everything_in_reading_order():
    assert caption(SCENE, Random(0), "en").answer == (
        "a1 large red ring, b2 small blue cross, c2 small red cross, text K7"
    )
    assert caption(SCENE, Random(0), "zh").answer == "a1大红色圆环，b2小蓝色十字，c2小红色十字，文字K7"


def test_colour_and_shape_ask_only_about_what_is_unique():
    assert ask_often("colour") == {"What color is the ring?": "red"}
    assert ask_often("shape") == {"What shape is blue?": "cross"}
    assert ask_often("shape", "zh") == {"蓝色的是什么形状？": "十字"}


def test_counts_are_right_and_zero_is_asked_too():
    counts = ask_often("count")
    assert counts["How many red shapes are there?"] == "2"
    assert counts["How many blue shapes are there?"] == "1"
    assert counts["How many green shapes are there?"] == "0"


def test_existence_is_asked_as_wanted_or_not_at_all():
    assert ask_often("existence") == {"Is there a red shape?": "yes", "Is there a blue shape?": "yes"}
    absent = ask_often("existence", want_yes=False)
    assert absent == {"Is there a green shape?": "no", "Is there a yellow shape?": "no"}
    assert ASK["existence"](Scene(()), Random(0), "en", True) is None


def test_relations_are_of_shapes_with_a_colour_of_their_own_on_a_side():
    scene = Scene((*SCENE.shapes, Shape(8, "small", "green", "ring"), Shape(1, "large", "yellow", "ring")))
    questions = [ASK["relation"](scene, Random(seed), "en", True) for seed in range(200)]
    assert {question.text: question.answer for question in questions} == {
        "Is the green shape at the left or the right?": "right",
        "Is the green shape at the top or the bottom?": "bottom",
        "Is the yellow shape at the top or the bottom?": "top",
    }
    assert ASK["relation"](SCENE, Random(0), "en", True) is None


def test_several_facts_come_in_the_order_of_the_question():
    scene = Scene((*SCENE.shapes, Shape(8, "small", "green", "square")))
    expected = {
        colours_of: [{"ring red", "square green"}],
        sides_of: [{"blue middle", "green bottom"}, {"blue middle", "green right"}],
        counts_of: [{"red2", "blue1", "green1", "yellow0"}],
    }
    for ask, facts in expected.items():
        orders = set()
        for seed in range(20):
            question = ask(scene, Random(seed), "en")
            names = re.search(r": (.+)\?$", question.text).group(1).split(", ")
            answers = question.answer.split(", ")
            assert set(answers) in facts
            assert [re.match("[a-z]+", answer).group() for answer in answers] == names
            orders.add(tuple(names))
        assert len(orders) > 1


def test_several_facts_are_asked_in_chinese_too():
    scene = Scene(SCENE.shapes[:1])
    assert colours_of(scene, Random(0), "zh").text == "这些是什么颜色：圆环？"
    assert colours_of(scene, Random(0), "zh").answer == "圆环红色"
    assert {sides_of(scene, Random(seed), "zh").answer for seed in range(9)} == {"红色上面", "红色左边"}
    assert set(counts_of(scene, Random(0), "zh").answer.split("，")) == {"红色1", "绿色0", "蓝色0", "黄色0"}


def test_nothing_is_asked_of_what_occurs_twice():
    scene = Scene((Shape(0, "large", "red", "ring"), Shape(4, "small", "red", "ring")))
    assert colours_of(scene, Random(0), "en") is None
    assert sides_of(scene, Random(0), "en") is None


def test_the_code_is_read():
    assert ask_often("ocr") == {"What text is written?": "K7"}
    assert ASK["ocr"](Scene(SCENE.shapes), Random(0), "en", True) is None


@pytest.mark.parametrize("seed", range(40))
def test_every_step_of_a_chain_of_thought_is_true(seed):
    random = Random(seed)
    scene = draw_scene(random, split="train", min_shapes=3, max_shapes=6)
    question = ask_reasoning(scene, random, naming_fraction=0.5)
    lines = question.response.split("\n")
    found, (tally, *steps, final) = lines[: lines[0].startswith("Find ")], lines[lines[0].startswith("Find ") :]
    counts = [(name, int(n)) for name, n in (re.fullmatch(r"(\w+)(\d)", part).groups() for part in tally.split(", "))]
    names, numbers = zip(*counts, strict=True)
    shapes = ", ".join(f"{s.colour} {s.shape}" for s in scene.shapes)
    assert found in ([], [f"Find {' and '.join(names)}: {shapes}"])
    assert all(n == sum(s.colour == name for s in scene.shapes) for name, n in counts)
    assert [question.text.index(name) for name in names] == sorted(question.text.index(name) for name in names)
    for step in steps:
        left, right = re.sub("x", "*", step).split("=")
        assert eval(left) == int(right)
    if len(names) == 3:
        points = [int(number) for number in re.findall(r"\d+", question.text)]
        total = sum(n * value for n, value in zip(numbers, points, strict=True))
        assert [step.split("=")[0] for step in steps[:3]] == [f"{n}x{v}" for n, v in zip(numbers, points, strict=True)]
    else:
        total = numbers[0] - numbers[1]
    assert steps[-1].endswith(f"={total}")
    assert (final, question.answer) == (f"Final answer: {total}", str(total))
    assert total >= 0
