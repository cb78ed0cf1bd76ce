"""What a drawn scene holds, and how scenes are drawn at random.

A scene is a 3 x 3 board of cells, named as on a chess board with a1 at the top left: columns a to c, rows 1 to 3.
A cell holds nothing, one shape, or one printed character. Called by questions, changes, reasoning and write.
"""

import zlib
from dataclasses import dataclass, replace
from random import Random

GRID = 3
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("ring", "square", "triangle", "cross")
SIZES = ("small", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")
LETTERS = "ACEFHKLMPRTX"
DIGITS = "0123456789"
NUM_BACKGROUNDS = 6
MAX_CODE_LENGTH = GRID

_SPLIT_BUCKETS = {"test": (0,), "val": (1,), "train": (2, 3, 4, 5, 6, 7)}


@dataclass(frozen=True, order=True)
class Shape:
    """One shape in one cell. `cell` counts in reading order; `shift` moves it inside the cell, in 64ths of the side."""

    cell: int
    size: str
    colour: str
    shape: str
    shift: tuple[int, int] = (0, 0)

    @property
    def column(self) -> int:
        """0 (left) to 2."""
        return self.cell % GRID

    @property
    def row(self) -> int:
        """0 (top) to 2."""
        return self.cell // GRID

    @property
    def cell_name(self) -> str:
        """`a1` for cell 0 (top left), `b1` for cell 1, `c3` for cell 8."""
        return f"{'abc'[self.column]}{self.row + 1}"

    @property
    def place(self) -> tuple[str, str]:
        """Words for row and column: ("top", "left"), ("middle", "middle"), .."""
        return ROWS[self.row], COLUMNS[self.column]


@dataclass(frozen=True)
class Scene:
    """Shapes in reading order, and at most one printed code that starts at `code_cell` and runs to the right."""

    shapes: tuple[Shape, ...]
    code: str = ""
    code_cell: int = 0
    background: int = 0

    @property
    def free_cells(self) -> list[int]:
        """Cells that hold nothing, in reading order."""
        taken = {s.cell for s in self.shapes} | set(range(self.code_cell, self.code_cell + len(self.code)))
        return [cell for cell in range(GRID * GRID) if cell not in taken]

    @property
    def split(self) -> str:
        """The split this scene belongs to, by a checksum of its content: two splits can never hold the same scene."""
        parts = [f"{s.size} {s.colour} {s.shape} {s.cell}" for s in self.shapes] + [self.code, str(self.code_cell)]
        bucket = zlib.crc32(";".join(parts).encode()) % 8
        return next(name for name, buckets in _SPLIT_BUCKETS.items() if bucket in buckets)

    def with_shapes(self, shapes: list[Shape]) -> "Scene":
        """The same scene with other shapes, put in reading order."""
        return replace(self, shapes=tuple(sorted(shapes)))


def draw_scene(random: Random, *, split: str, min_shapes: int, max_shapes: int, with_code: bool = False) -> Scene:
    """A random scene of `split`.

    The number of shapes is uniform. In half of the scenes the shapes tend to share one colour or one form, so that
    counts above one are common.
    """
    while True:
        scene = draw_any_scene(random, min_shapes, max_shapes, with_code)
        if scene.split == split:
            return scene


def draw_shape(random: Random, cell: int) -> Shape:
    """A random shape in `cell`."""
    size = random.choice(SIZES)
    shift = (random.randint(-1, 1), random.randint(-1, 1))
    return Shape(cell, size, random.choice(COLOURS), random.choice(SHAPES), shift)


def draw_any_scene(random: Random, min_shapes: int, max_shapes: int, with_code: bool = False) -> Scene:
    """As `draw_scene`, of any split."""
    code, code_cell = "", 0
    if with_code:
        code = _draw_code(random)
        code_cell = GRID * random.randrange(GRID) + random.randint(0, GRID - len(code))
    scene = Scene((), code, code_cell, random.randrange(NUM_BACKGROUNDS))
    cells = random.sample(scene.free_cells, random.randint(min_shapes, max_shapes))
    shapes = [draw_shape(random, cell) for cell in cells]
    theme = random.random()
    if theme < 0.25:
        colour = random.choice(COLOURS)
        shapes = [replace(s, colour=colour) if random.random() < 0.6 else s for s in shapes]
    elif theme < 0.5:
        form = random.choice(SHAPES)
        shapes = [replace(s, shape=form) if random.random() < 0.6 else s for s in shapes]
    return scene.with_shapes(shapes)


def _draw_code(random: Random) -> str:
    """Letters and digits by turns, so that a tokenizer that splits digits reads one character per token."""
    length = random.randint(2, MAX_CODE_LENGTH)
    start = random.randrange(2)
    return "".join(random.choice(LETTERS if (start + i) % 2 else DIGITS) for i in range(length))
