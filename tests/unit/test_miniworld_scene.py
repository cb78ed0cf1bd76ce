"""Scenes and pictures: places, splits, and that what is named is what is drawn."""

from random import Random

import pytest

from minivlm.data.miniworld.changes import DIFFERENCES, EVENTS, draw_difference, draw_sequence
from minivlm.data.miniworld.draw import draw_picture
from minivlm.data.miniworld.scene import Scene, Shape, draw_scene


def test_cells_count_from_the_top_left():
    shapes = [Shape(cell, "large", "red", "ring") for cell in (0, 1, 3, 8)]
    assert [shape.cell_name for shape in shapes] == ["a1", "b1", "a2", "c3"]
    assert [shape.place for shape in shapes] == [
        ("top", "left"),
        ("top", "middle"),
        ("middle", "left"),
        ("bottom", "right"),
    ]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_scene_belongs_to_the_split_it_was_drawn_for_and_to_no_other(split):
    random = Random(0)
    scenes = [draw_scene(random, split=split, min_shapes=2, max_shapes=4) for _ in range(50)]
    assert {scene.split for scene in scenes} == {split}


def test_the_split_does_not_depend_on_background_or_jitter():
    plain = Scene((Shape(3, "large", "red", "cross"),))
    moved = Scene((Shape(3, "large", "red", "cross", (1, -1)),), background=4)
    assert plain.split == moved.split


def test_a_shape_is_drawn_in_its_cell_and_nowhere_else():
    empty, scene = Scene(()), Scene((Shape(5, "large", "blue", "square", (1, 1)),))
    before, after = draw_picture(empty, 72), draw_picture(scene, 72)
    assert after.getpixel((2 * 24 + 13, 24 + 13)) == (40, 80, 230)
    outside = [(x, y) for x in range(72) for y in range(72) if not (x >= 48 and 24 <= y < 49)]
    assert all(before.getpixel(at) == after.getpixel(at) for at in outside)


def test_a_code_is_printed_one_character_per_cell():
    blank, printed = draw_picture(Scene(()), 72), draw_picture(Scene((), code="A7", code_cell=4), 72)
    inked = {
        y // 24 * 3 + x // 24
        for x in range(72)
        for y in range(72)
        if blank.getpixel((x, y)) != printed.getpixel((x, y))
    }
    assert inked == {4, 5}


def test_no_two_things_share_a_cell():
    random = Random(1)
    for _ in range(200):
        scene = draw_scene(random, split="train", min_shapes=2, max_shapes=6, with_code=True)
        assert len(scene.free_cells) == 9 - len(scene.shapes) - len(scene.code)


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_a_difference_changes_the_named_shape_only(kind):
    (first, second), question, back = draw_difference(Random(2), "train", 4, kind)
    key = lambda s: (s.cell, s.colour, s.shape, s.size)  # noqa: E731
    gone = {key(s) for s in first.shapes} - {key(s) for s in second.shapes}
    came = {key(s) for s in second.shapes} - {key(s) for s in first.shapes}
    assert (len(gone), len(came)) == {"added": (0, 1), "removed": (1, 0)}.get(kind, (1, 1))
    assert question.answer == kind
    assert back.answer == {"added": "removed", "removed": "added"}.get(kind, kind)
    if kind == "moved":
        assert next(iter(gone))[1:] == next(iter(came))[1:]
    if kind == "recolored":
        assert next(iter(gone))[0] == next(iter(came))[0]


@pytest.mark.parametrize("event", EVENTS)
def test_a_sequence_shows_its_event(event):
    frames, question, back = draw_sequence(Random(3), "train", 4, event)
    expected = {"appears": "disappears", "disappears": "appears"}.get(event, event)
    assert back.answer == expected
    still = set(frames[0].shapes) & set(frames[1].shapes) & set(frames[2].shapes)
    first, last = (next(iter(set(frame.shapes) - still), None) for frame in (frames[0], frames[2]))
    assert question.answer == event
    if event == "moves":
        assert sorted([abs(last.column - first.column), abs(last.row - first.row)]) == [0, 2]
    elif event == "changes color":
        assert first.cell == last.cell
        assert first.colour != last.colour
    else:
        assert (first is None, last is None) == (event == "appears", event == "disappears")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_picture_of_a_change_is_a_scene_of_its_split(split):
    for draw, kinds in ((draw_difference, DIFFERENCES), (draw_sequence, EVENTS)):
        for kind in kinds:
            scenes, _, _ = draw(Random(4), split, 3, kind)
            assert {scene.split for scene in scenes} == {split}
