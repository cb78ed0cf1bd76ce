"""Questions about several pictures: what differs between two, and what happens in three frames."""

from dataclasses import replace
from random import Random

from minivlm.data.miniworld.questions import Question
from minivlm.data.miniworld.scene import COLOURS, GRID, Scene, Shape, draw_scene, draw_shape

DIFFERENCES = ("added", "removed", "moved", "turned")
EVENTS = ("moves left", "moves right", "moves up", "moves down", "appears", "disappears", "changes color")
_STEPS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}


def draw_difference(random: Random, *, split: str, max_shapes: int, kind: str) -> tuple[list[Scene], Question]:
    """Two scenes that differ in one shape: added, removed, moved to another cell, or turned to another colour."""
    first = draw_scene(random, split=split, min_shapes=2, max_shapes=max_shapes - 1)
    shapes = list(first.shapes)
    if kind == "added":
        actor = draw_shape(random, random.choice(first.free_cells))
        answer, shapes = f"{actor.colour} {actor.shape} added", [*shapes, actor]
    else:
        actor = random.choice(shapes)
        shapes.remove(actor)
        answer = f"{actor.colour} {actor.shape} {kind}"
    if kind == "moved":
        shapes.append(replace(actor, cell=random.choice(first.free_cells)))
    if kind == "turned":
        colour = _other_colour(random, actor.colour)
        answer, shapes = f"{answer} {colour}", [*shapes, replace(actor, colour=colour)]
    return [first, first.with_shapes(shapes)], Question("difference", "What changed?", answer, answer)


def draw_sequence(random: Random, *, split: str, max_shapes: int, event: str) -> tuple[list[Scene], Question]:
    """Three frames: one shape moves a cell per frame, appears, disappears or changes its colour; the others stay."""
    while True:
        still = draw_scene(random, split=split, min_shapes=2, max_shapes=max(2, max_shapes - 1))
        path = _path(random, still, event)
        if path:
            break
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
    return frames, Question("sequence", "What happens?", event, event)


def _path(random: Random, still: Scene, event: str) -> list[int]:
    """Three free cells in the direction of the event (one cell three times where nothing moves); [] without any."""
    across, down = _STEPS.get(event, (0, 0))
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
