"""Questions about one hand-made scene, whose answers can be read off it."""

import re
from random import Random

import pytest

from minivlm.data.miniworld.questions import ASK, caption
from minivlm.data.miniworld.reasoning import ask_reasoning
from minivlm.data.miniworld.scene import COLOURS, Scene, Shape, draw_scene

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
        "large red ring at a1, small blue cross at b2, small red cross at c2, text K7"
    )
    assert caption(SCENE, Random(0), "zh").answer == "a1大红色圆环，b2小蓝色十字，c2小红色十字，文字K7"


def test_colour_and_shape_ask_only_about_what_is_unique():
    assert ask_often("colour") == {"What color is the ring?": "red"}
    assert ask_often("shape") == {"What shape is blue?": "cross"}
    assert ask_often("shape", "zh") == {"蓝色的是什么形状？": "十字"}


def test_counts_are_right_and_zero_is_asked_too():
    counts = ask_often("count")
    assert counts["How many crosses are there?"] == "2"
    assert counts["How many red shapes are there?"] == "2"
    assert counts["How many squares are there?"] == "0"


def test_existence_is_about_colour_and_form_together():
    assert set(ask_often("existence").values()) == {"yes"}
    absent = ask_often("existence", want_yes=False)
    assert set(absent.values()) == {"no"}
    assert "Is there a blue ring?" in absent
    assert "Is there a red cross?" not in absent


def test_relations_follow_columns_and_rows():
    relations = ask_often("relation")
    assert relations["Is the red ring left or right of the blue cross?"] == "left"
    assert relations["Is the red cross above or below the red ring?"] == "below"
    assert "Is the red cross above or below the blue cross?" not in relations


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
    for line, step in zip(groups[::2], groups[1::2], strict=True):
        name, cells = line.split(": ")
        places = [s.place for s in scene.shapes if name in (s.colour, s.shape, s.size)]
        assert cells == (" ".join(places) or "none")
        count, *product = (int(number) for number in re.findall(r"\d+", step))
        assert count == len(places)
        numbers.append(product[1] if product else count)
        assert not product or product[1] == count * product[0]
        assert f"{name} shape" in question.text or (name not in COLOURS and name in question.text)
    sign = 1 if "+" in last else -1
    total = numbers[0] + sign * numbers[1]
    assert last.endswith(f"={total}")
    assert final == f"Final answer: {total}"
    assert question.answer == str(total)
    assert total >= 0
