"""Questions about one hand-made scene, whose answers can be read off it."""

import re
from random import Random

import pytest

from minivlm.data.miniworld.questions import ASK, caption
from minivlm.data.miniworld.reasoning import ask_reasoning
from minivlm.data.miniworld.scene import COLOURS, Scene, Shape, draw_scene

SCENE = Scene(
    (Shape(0, "large", "red", "circle"), Shape(6, "small", "blue", "star"), Shape(7, "small", "red", "star")),
    code="K7",
    code_cell=12,
)


def ask_often(task: str, language: str = "en", want_yes: bool = True) -> dict[str, str]:
    """Every question of a task that 200 draws bring, with its answer."""
    asked = [ASK[task](SCENE, Random(seed), language, want_yes) for seed in range(200)]
    return {question.text: question.answer for question in asked}


def test_the_caption_names_everything_in_reading_order():
    assert caption(SCENE, Random(0), "en").answer == (
        "large red circle at a1, small blue star at c2, small red star at d2, text K7"
    )
    assert caption(SCENE, Random(0), "zh").answer == "a1大红色圆形，c2小蓝色星形，d2小红色星形，文字K7"


def test_colour_and_shape_ask_only_about_what_is_unique():
    assert ask_often("colour") == {"What color is the circle?": "red"}
    assert ask_often("shape") == {"What shape is blue?": "star"}
    assert ask_often("shape", "zh") == {"蓝色的是什么形状？": "星形"}


def test_counts_are_right_and_zero_is_asked_too():
    counts = ask_often("count")
    assert counts["How many stars are there?"] == "2"
    assert counts["How many red shapes are there?"] == "2"
    assert counts["How many rings are there?"] == "0"


def test_existence_is_about_colour_and_form_together():
    assert set(ask_often("existence").values()) == {"yes"}
    absent = ask_often("existence", want_yes=False)
    assert set(absent.values()) == {"no"}
    assert "Is there a blue circle?" in absent
    assert "Is there a red star?" not in absent


def test_relations_follow_columns_and_rows():
    relations = ask_often("relation")
    assert relations["Is the red circle left or right of the blue star?"] == "left"
    assert relations["Is the red star above or below the red circle?"] == "below"
    assert "Is the red star above or below the blue star?" not in relations


def test_the_code_is_read():
    assert ask_often("ocr") == {"What text is written?": "K7"}
    assert ASK["ocr"](Scene(SCENE.shapes), Random(0), "en", True) is None


@pytest.mark.parametrize("seed", range(40))
def test_every_step_of_a_chain_of_thought_is_true(seed):
    random = Random(seed)
    scene = draw_scene(random, split="train", min_shapes=3, max_shapes=6)
    question = ask_reasoning(scene, random)
    *groups, last, final = question.response.split("\n")
    numbers = []
    for line in groups:
        name, cells, step = line.split(": ")
        places = [s.place for s in scene.shapes if name in (s.colour, s.shape, s.size)]
        assert cells == (", ".join(places) or "none")
        count, *product = (int(number) for number in re.findall(r"\d+", step))
        assert count == len(places)
        numbers.append(product[1] if product else count)
        assert not product or product[1] == count * product[0]
        assert f"{name} shape" in question.text or (name not in COLOURS and name in question.text)
    sign = 1 if "+" in last else -1
    total = numbers[0] + sign * numbers[1]
    assert last.endswith(f"= {total}")
    assert final == f"Final answer: {total}"
    assert question.answer == str(total)
    assert total >= 0
