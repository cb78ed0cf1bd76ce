"""Questions about several pictures: what differs between two, and what happens in three frames."""

from dataclasses import replace
from random import Random

from minivlm.data.miniworld.questions import Question
from minivlm.data.miniworld.scene import COLOURS, GRID, Scene, Shape, draw_any_scene, draw_scene, draw_shape

Change = tuple[list[Scene], Question, Question]
"""Pictures in order, the question about them, and the question about them in the opposite order."""

DIFFERENCES = ("added", "removed", "moved", "recolored")
EVENTS = ("moves", "appears", "disappears", "changes color")
_DIRECTIONS = ((-1, 0), (1, 0), (0, -1), (0, 1))
_BACK = {"added": "removed", "removed": "added", "appears": "disappears", "disappears": "appears"}


def draw_difference(random: Random, split: str, max_shapes: int, kind: str) -> Change:
    """Two scenes that differ in one shape: added, removed, moved to another cell, or given another colour."""
    while True:
        scenes = _draw_pair(random, split, max_shapes, kind)
        if scenes[1].split == split:
            return _change("difference", scenes, kind)


def _draw_pair(random: Random, split: str, max_shapes: int, kind: str) -> list[Scene]:
    first = draw_scene(random, split=split, min_shapes=2, max_shapes=max_shapes - 1)
    shapes = list(first.shapes)
    if kind == "added":
        actor = draw_shape(random, random.choice(first.free_cells))
        shapes.append(actor)
    else:
        actor = random.choice(shapes)
        shapes.remove(actor)
    if kind == "moved":
        shapes.append(replace(actor, cell=random.choice(first.free_cells)))
    if kind == "recolored":
        shapes.append(replace(actor, colour=_other_colour(random, actor.colour)))
    return [first, first.with_shapes(shapes)]


def draw_sequence(random: Random, split: str, max_shapes: int, event: str) -> Change:
    """Three frames: one shape moves a cell per frame, appears, disappears or changes its colour; the others stay."""
    while True:
        frames = _draw_frames(random, max_shapes, event)
        if all(frame.split == split for frame in frames):
            return _change("sequence", frames, event)


def _draw_frames(random: Random, max_shapes: int, event: str) -> list[Scene]:
    direction = random.choice(_DIRECTIONS) if event == "moves" else (0, 0)
    path: list[int] = []
    while not path:
        still = draw_any_scene(random, 2, max(2, max_shapes - 1))
        path = _path(random, still, direction)
    actor = draw_shape(random, path[0])
    colour = _other_colour(random, actor.colour)
    turn = random.randint(1, 2)
    frames: list[Scene] = []
    for t in range(3):
        now: Shape | None = replace(actor, cell=path[t])
        if (event == "appears" and t < turn) or (event == "disappears" and t >= turn):
            now = None
        elif event == "changes color" and t >= turn:
            now = replace(actor, colour=colour)
        frames.append(still.with_shapes([*still.shapes, now] if now else list(still.shapes)))
    return frames


def _change(task: str, scenes: list[Scene], kind: str) -> Change:
    text = "What was done to a shape?" if task == "difference" else "What happens?"
    there, back = (Question(task, text, answer, answer) for answer in (kind, _BACK.get(kind, kind)))
    return scenes, there, back


def _path(random: Random, still: Scene, direction: tuple[int, int]) -> list[int]:
    """Three free cells in the direction (one cell three times where it is (0, 0)); [] without any."""
    across, down = direction
    free = set(still.free_cells)
    paths = []
    for cell in still.free_cells:
        places = [(cell % GRID + across * t, cell // GRID + down * t) for t in range(3)]
        cells = [row * GRID + column for column, row in places if 0 <= column < GRID and 0 <= row < GRID]
        if len(cells) == 3 and free.issuperset(cells):
            paths.append(cells)
    return random.choice(paths) if paths else []


def _other_colour(random: Random, colour: str) -> str:
    return random.choice([c for c in COLOURS if c != colour])
