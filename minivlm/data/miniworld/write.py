"""Draw the whole data set into a folder: pictures and LLaVA JSON, just as a user would bring them.

    counts = build_miniworld(folder, seed=0, train_scenes=8000, ...)

A plan first fixes the split, kind and questions of every scene, so that counts are exact and answers balanced; each
scene is then drawn from a random generator of its own. Called by the prepare job when no source is configured.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from minivlm.data.miniworld.changes import DIFFERENCES, EVENTS, draw_difference, draw_sequence
from minivlm.data.miniworld.draw import draw_picture
from minivlm.data.miniworld.questions import ASK, Question, caption, colours_of, counts_of, sides_of
from minivlm.data.miniworld.reasoning import ask_directly, ask_reasoning
from minivlm.data.miniworld.scene import GRID, Scene, draw_scene

FILES = ("pretrain", "sft", "prompts")
CAPTION_SHARE = 0.25
"""Share of training scenes whose caption is asked for in SFT too, so that it is not forgotten."""

CONVERSATION_SHARE = 0.1
"""Share of training scenes whose questions are the turns of one conversation. Small, because earlier turns tell what
later ones ask, so that less is learned from the picture."""

DENSE = (colours_of, counts_of, sides_of)
"""Asked of training scenes beside their questions: from many facts at once more is learned."""

DENSE_PER_SCENE = 2

Row = dict[str, Any]
Conversation = tuple[str, list[int], list[Question]]
"""File, places of its pictures among the scenes drawn, and one question per turn."""


@dataclass(frozen=True)
class Planned:
    """One scene to draw. `number` counts the scenes of this split and kind, and settles what must be balanced."""

    split: str
    kind: str
    number: int
    tasks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unique; the stem of the pictures' file names and of the rows' ids."""
        return f"{self.split}-{self.kind}-{self.number:05d}"


@dataclass(frozen=True)
class _Recipe:
    seed: int
    image_size_px: int
    max_objects: int
    reasoning_max_objects: int
    direct_reasoning_fraction: float
    naming_fraction: float
    chinese_fraction: float


def build_miniworld(
    out_dir: Path,
    *,
    seed: int,
    train_scenes: int,
    change_scenes: int,
    reasoning_scenes: int,
    prompt_scenes: int,
    val_questions_per_task: int,
    test_questions_per_task: int,
    test_reasoning_questions: int,
    questions_per_scene: int,
    image_size_px: int,
    max_objects: int,
    reasoning_max_objects: int,
    direct_reasoning_fraction: float,
    naming_fraction: float,
    chinese_fraction: float,
) -> dict[str, int]:
    """Write `images/*.png`, `pretrain.json` (captions), `sft.json` (questions) and `prompts.json` into `out_dir`.

    The arguments are the fields of the miniworld settings, which document them. The result depends on nothing else.
    `prompts.json` holds reasoning questions on training scenes of their own, with the truth but no chain of thought.
    A training picture has a row per question, or some as one conversation; a pair or sequence is asked both ways round.

    Returns:
        Number of rows per file and split (`sft/train`), of test questions per task (`test/colour`), and of `pictures`.

    Raises:
        ValueError: sizes that cannot be drawn.
    """
    _check(image_size_px, max_objects, reasoning_max_objects, questions_per_scene)
    recipe = _Recipe(
        seed,
        image_size_px,
        max_objects,
        reasoning_max_objects,
        direct_reasoning_fraction,
        naming_fraction,
        chinese_fraction,
    )
    plan = [
        *_plan_split("train", train_scenes, change_scenes, reasoning_scenes, questions_per_scene, seed),
        *(Planned("train", "prompt", i, ("reasoning",)) for i in range(prompt_scenes)),
        *_plan_held_out("val", val_questions_per_task, val_questions_per_task),
        *_plan_held_out("test", test_questions_per_task, test_reasoning_questions),
    ]
    (out_dir / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Row]] = {name: [] for name in FILES}
    counts: Counter[str] = Counter()
    for planned in plan:
        for file, row in _draw(planned, recipe, out_dir):
            rows[file].append(row)
            counts[f"{file}/{planned.split}"] += 1
            counts[f"test/{row['task']}"] += planned.split == "test"
    for file in FILES:
        (out_dir / f"{file}.json").write_text(json.dumps(rows[file], ensure_ascii=False), encoding="utf-8")
    counts["pictures"] = sum(1 for _ in (out_dir / "images").iterdir())
    return {key: count for key, count in sorted(counts.items()) if count}


def expected_rows(
    train_scenes: int,
    change_scenes: int,
    reasoning_scenes: int,
    prompt_scenes: int,
    questions_per_scene: int,
    direct_reasoning_fraction: float,
) -> dict[str, int]:
    """Training rows per stage that `build_miniworld` will write; those of SFT on average, as some are drawn by lot."""
    asked = questions_per_scene + CAPTION_SHARE
    per_scene = CONVERSATION_SHARE + (1 - CONVERSATION_SHARE) * asked + DENSE_PER_SCENE
    per_reasoning = 2 + direct_reasoning_fraction
    sft = round(train_scenes * per_scene + reasoning_scenes * per_reasoning) + 4 * change_scenes
    return {"pretrain": train_scenes, "sft": sft, "prompts": prompt_scenes}


def _check(image_size_px: int, max_objects: int, reasoning_max_objects: int, questions_per_scene: int) -> None:
    if image_size_px % GRID:
        raise ValueError(f"image_size_px is {image_size_px}, but three cells must fit a side: type a multiple of 3")
    if not 3 <= max_objects <= 6 or not 3 <= reasoning_max_objects <= 9:
        raise ValueError(
            f"max_objects is {max_objects} and reasoning_max_objects {reasoning_max_objects}: "
            "the 9 cells take 3 to 6 shapes beside a printed code, and 3 to 9 in a reasoning scene"
        )
    if questions_per_scene > len(ASK):
        raise ValueError(f"questions_per_scene is {questions_per_scene}: a scene has at most {len(ASK)} kinds")


def _plan_split(
    split: str, scenes: int, changes: int, reasoning: int, questions_per_scene: int, seed: int
) -> Iterator[Planned]:
    random = Random(f"{seed} {split} tasks")
    for i in range(scenes):
        yield Planned(split, "scene", i, tuple(random.sample(sorted(ASK), questions_per_scene)))
    for i in range(changes):
        yield Planned(split, "difference", i)
        yield Planned(split, "sequence", i)
    for i in range(reasoning):
        yield Planned(split, "reasoning", i, ("reasoning",))


def _plan_held_out(split: str, questions_per_task: int, reasoning: int) -> Iterator[Planned]:
    tasks = sorted(ASK)
    for i in range(questions_per_task * len(tasks)):
        yield Planned(split, "scene", i, (tasks[i % len(tasks)],))
    yield from _plan_split(split, 0, questions_per_task, reasoning, 0, 0)


def _draw(planned: Planned, recipe: _Recipe, out_dir: Path) -> Iterator[tuple[str, Row]]:
    """Draw one planned scene, save its pictures, and yield (file, row) for each conversation about it."""
    random = Random(f"{recipe.seed} {planned.name}")
    if planned.kind in ("difference", "sequence"):
        scenes, conversations = _changes(random, planned, recipe)
    elif planned.kind == "scene":
        scenes, conversations = _questions(random, planned, recipe)
    else:
        scenes, conversations = _reasoning(random, planned, recipe)
    images = [_save(scene, f"{planned.name}-{i}", recipe, out_dir) for i, scene in enumerate(scenes)]
    for number, (file, order, questions) in enumerate(conversations):
        row_id = f"{planned.name}-{file}-{number}"
        yield file, _row(row_id, [images[i] for i in order], questions, planned.split)


def _changes(random: Random, planned: Planned, recipe: _Recipe) -> tuple[list[Scene], list[Conversation]]:
    kinds, draw = (DIFFERENCES, draw_difference) if planned.kind == "difference" else (EVENTS, draw_sequence)
    kind = kinds[planned.number % len(kinds)]
    scenes, question, back = draw(random, planned.split, recipe.max_objects, kind)
    order = list(range(len(scenes)))
    conversations: list[Conversation] = [("sft", order, [question])]
    if planned.split == "train":
        conversations.append(("sft", order[::-1], [back]))
    return scenes, conversations


def _questions(random: Random, planned: Planned, recipe: _Recipe) -> tuple[list[Scene], list[Conversation]]:
    scene, questions = _draw_asked(random, planned, recipe)
    conversations: list[Conversation] = [("pretrain", [0], [caption(scene, random, _language(random, recipe))])]
    if planned.split == "train" and random.random() < CAPTION_SHARE:
        questions.append(caption(scene, random, _language(random, recipe)))
    if planned.split == "train" and random.random() < CONVERSATION_SHARE:
        conversations.append(("sft", [0], questions))
    else:
        conversations.extend(("sft", [0], [question]) for question in questions)
    if planned.split == "train":
        told = [tell(scene, random, _language(random, recipe)) for tell in random.sample(DENSE, DENSE_PER_SCENE)]
        conversations.extend(("sft", [0], [question]) for question in told if question)
    return [scene], conversations


def _reasoning(random: Random, planned: Planned, recipe: _Recipe) -> tuple[list[Scene], list[Conversation]]:
    scene = draw_scene(random, split=planned.split, min_shapes=3, max_shapes=recipe.reasoning_max_objects)
    questions = [ask_reasoning(scene, random, naming_fraction=recipe.naming_fraction)]
    if planned.kind == "prompt":
        questions = [Question("reasoning", q.text, q.answer, q.answer) for q in questions]
        return [scene], [("prompts", [0], questions)]
    if planned.split == "train":
        questions.append(ask_reasoning(scene, random, naming_fraction=recipe.naming_fraction))
        if random.random() < recipe.direct_reasoning_fraction:
            questions.append(ask_directly(questions[-1]))
    return [scene], [("sft", [0], [question]) for question in questions]


def _draw_asked(random: Random, planned: Planned, recipe: _Recipe) -> tuple[Scene, list[Question]]:
    """A scene that all planned questions can be asked about. Yes and no alternate with the scene's number."""
    with_code = "ocr" in planned.tasks or random.random() < 0.2
    want_yes = planned.number // len(ASK) % 2 == 0 if planned.split != "train" else planned.number % 2 == 0
    while True:
        scene = draw_scene(
            random, split=planned.split, min_shapes=2, max_shapes=recipe.max_objects, with_code=with_code
        )
        questions = [ASK[task](scene, random, _language(random, recipe), want_yes) for task in planned.tasks]
        asked = [question for question in questions if question]
        if len(asked) == len(questions):
            return scene, asked


def _language(random: Random, recipe: _Recipe) -> str:
    return "zh" if random.random() < recipe.chinese_fraction else "en"


def _save(scene: Scene, stem: str, recipe: _Recipe, out_dir: Path) -> str:
    name = f"images/{stem}.png"
    draw_picture(scene, recipe.image_size_px).save(out_dir / name, compress_level=1)
    return name


def _row(row_id: str, images: list[str], questions: list[Question], split: str) -> Row:
    """LLaVA JSON row. Several questions make one conversation, which then has no task and answer of its own."""
    turns = []
    for i, question in enumerate(questions):
        places = "<image>\n" * len(images) if i == 0 else ""
        turns.append({"from": "human", "value": places + question.text})
        turns.append({"from": "gpt", "value": question.response})
    row: Row = {"id": row_id, "image": images if len(images) > 1 else images[0], "conversations": turns}
    single = len(questions) == 1
    row |= {"task": questions[0].task if single else "questions", "language": questions[0].language, "split": split}
    return row | ({"answer": questions[0].answer} if single else {})
