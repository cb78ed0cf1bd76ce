"""The written data set: counts, balance, splits, reproducibility."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from minivlm.data.miniworld.write import build_miniworld, expected_rows

SMALL = {
    "seed": 0,
    "train_scenes": 60,
    "change_scenes": 12,
    "reasoning_scenes": 20,
    "prompt_scenes": 15,
    "val_questions_per_task": 8,
    "test_questions_per_task": 28,
    "test_reasoning_questions": 30,
    "questions_per_scene": 4,
    "image_size_px": 72,
    "max_objects": 4,
    "reasoning_max_objects": 6,
    "direct_reasoning_fraction": 0.5,
    "naming_fraction": 0.5,
    "chinese_fraction": 0.12,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    build_miniworld(folder, **SMALL)
    return folder


def read(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def images_of(row: dict) -> list[str]:
    return row["image"] if isinstance(row["image"], list) else [row["image"]]


def test_every_task_has_its_number_of_test_questions(world):
    counts = Counter(row["task"] for row in read(world, "sft") if row["split"] == "test")
    assert counts.pop("reasoning") == 30
    assert set(counts) == {"colour", "shape", "count", "existence", "relation", "ocr", "difference", "sequence"}
    assert set(counts.values()) == {28}


@pytest.mark.parametrize("split", ["val", "test"])
def test_yes_and_no_are_balanced_exactly(world, split):
    answers = [r["answer"] for r in read(world, "sft") if r["split"] == split and r["task"] == "existence"]
    yes = sum(answer in ("yes", "有") for answer in answers)
    assert yes * 2 == len(answers)


def test_the_expected_rows_are_about_those_written(world):
    names = ("train_scenes", "change_scenes", "reasoning_scenes", "prompt_scenes", "questions_per_scene")
    expected = expected_rows(*(SMALL[name] for name in (*names, "direct_reasoning_fraction")))
    written = {file: sum(row["split"] == "train" for row in read(world, file)) for file in expected}
    assert expected["pretrain"] == written["pretrain"]
    assert expected["prompts"] == written["prompts"]
    assert abs(expected["sft"] - written["sft"]) <= 0.1 * written["sft"]


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_the_share_of_chains_that_name_every_shape_changes_no_question(world, tmp_path, fraction):
    build_miniworld(tmp_path, **SMALL | {"naming_fraction": fraction})
    chains = [r for r in read(tmp_path, "sft") if r["task"] == "reasoning" and "\n" in r["conversations"][1]["value"]]
    assert len(chains) >= 2 * SMALL["reasoning_scenes"]
    assert all(row["conversations"][1]["value"].startswith("Find ") == bool(fraction) for row in chains)
    asked = [[(r["id"], r["conversations"][0], r.get("answer")) for r in read(f, "sft")] for f in (world, tmp_path)]
    assert asked[0] == asked[1]


def test_some_reasoning_questions_are_asked_directly_too_and_nothing_else_changes(world, tmp_path):
    build_miniworld(tmp_path, **SMALL | {"direct_reasoning_fraction": 0.0})
    plain, rows = read(tmp_path, "sft"), read(world, "sft")
    added = [row for row in rows if row["id"] not in {other["id"] for other in plain}]
    assert [row for row in rows if row not in added] == plain
    assert 3 <= len(added) <= 17  # of 20 scenes, half of them on average
    for row in added:
        text, end = row["conversations"][0]["value"].rsplit("\n", 1)
        assert row["split"] == "train"
        assert end == "Answer the question using a single word or phrase."
        reasoned = [r for r in plain if r["image"] == row["image"] and r["conversations"][0]["value"].startswith(text)]
        assert [r["answer"] for r in reasoned] == [row["answer"]] == [row["conversations"][1]["value"]]


def test_training_changes_are_asked_both_ways_round(world):
    rows = [r for r in read(world, "sft") if r["split"] == "train" and r["task"] in ("difference", "sequence")]
    there, back = rows[::2], rows[1::2]
    assert len(there) == len(back) == 24
    opposite = {"added": "removed", "removed": "added", "appears": "disappears", "disappears": "appears"}
    for one, other in zip(there, back, strict=True):
        assert other["image"] == one["image"][::-1]
        assert other["answer"] == opposite.get(one["answer"], one["answer"])


def test_every_placeholder_has_its_picture(world):
    for row in read(world, "pretrain") + read(world, "sft") + read(world, "prompts"):
        text = "".join(turn["value"] for turn in row["conversations"])
        assert text.count("<image>") == len(images_of(row))
        assert all((world / name).is_file() for name in images_of(row))


def test_no_picture_is_in_two_splits(world):
    splits: dict[str, set[str]] = {}
    for row in read(world, "pretrain") + read(world, "sft") + read(world, "prompts"):
        for name in images_of(row):
            digest = hashlib.sha256((world / name).read_bytes()).hexdigest()
            splits.setdefault(digest, set()).add(row["split"])
    assert all(len(names) == 1 for names in splits.values())


def test_prompts_are_on_training_scenes_of_their_own_and_do_not_show_the_reasoning(world):
    used = {name for row in read(world, "sft") + read(world, "pretrain") for name in images_of(row)}
    for row in read(world, "prompts"):
        assert row["split"] == "train"
        assert row["image"] not in used
        assert row["conversations"][1]["value"] == row["answer"]


def test_captions_of_test_scenes_are_distinct(world):
    captions = [row["answer"] for row in read(world, "pretrain") if row["split"] == "test"]
    assert len(captions) == 6 * 28 == len(set(captions))


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(world, tmp_path):
    build_miniworld(tmp_path / "again", **SMALL)
    build_miniworld(tmp_path / "other", **{**SMALL, "seed": 1})
    for name in ("sft.json", "images/train-scene-00003-0.png"):
        assert (tmp_path / "again" / name).read_bytes() == (world / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (world / name).read_bytes()


def test_sizes_that_cannot_be_drawn_are_refused(tmp_path):
    with pytest.raises(ValueError, match="multiple of 3"):
        build_miniworld(tmp_path, **{**SMALL, "image_size_px": 73})
    with pytest.raises(ValueError, match="9 cells"):
        build_miniworld(tmp_path, **{**SMALL, "reasoning_max_objects": 10})
