"""From validated rows on disk to what a stage draws, its table, and errors that name the key. No cluster."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minivlm.config import Config, load_config
from minivlm.data.draw import drawn_pairs
from minivlm.data.errors import DataError
from minivlm.data.pipeline import count_rows, draw_rows, iter_training_rows, mixture_tables, used_pictures
from minivlm.data.readers import read_rows
from minivlm.data.samples import SampleWriter, iter_rows
from minivlm.data.settings import rules, sources
from minivlm.data.validate import check_rows
from minivlm.layout import draw_dir, run_dir, samples_dir
from minivlm.schema import IMAGE_PLACEHOLDER
from minivlm.storage import file_sha256, write_json

Row = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("red", (250, 0, 0)), ("blue", (0, 0, 250))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    write(tmp_path, "captions", [asked("Describe it.", "A red square.")])
    return tmp_path


def asked(question: str, *answers: str, image: str = "red.png", **extra: Any) -> Row:
    """One row of FineVision's shape: a question for each answer, all about one picture."""
    texts = [{"user": f"{question} {i}" if i else question, "assistant": answer} for i, answer in enumerate(answers)]
    return {"images": [image], "texts": texts, **extra}


def write(folder: Path, name: str, rows: list[Row]) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(folder: Path, sft: str, *overrides: str) -> Config:
    """Sources of SFT as YAML without their braces, one after another; pretraining has one caption."""
    given = ", ".join(f"{{split: train, path: {folder}/{source}}}" for source in sft.split("; "))
    (folder / "empty.yaml").write_text("")
    captions = f"data.pretrain=[{{split: train, path: {folder}/captions.jsonl}}]"
    return load_config(
        folder / "empty.yaml", [f"storage_path={folder}/store", captions, f"data.sft=[{given}]", *overrides]
    )


def validate(config: Config) -> None:
    """What prepare_samples does, in this process and without the tokenizer."""
    target = samples_dir(config)
    target.mkdir(parents=True)
    by_source: dict[str, dict[str, int]] = {}
    with SampleWriter(target) as writer:
        for source in sources(config):
            rows = list(read_rows(Path(source.path)))
            checked = check_rows(rows, source, rules(config))
            writer.add(checked.samples, checked.pairs, checked.bad)
            key = f"{source.stage}/{source.place}"
            by_source[key] = {"rows": len(rows), "bad": len(checked.bad), "held_out": 0}
    write_json(target / "summary.json", {"counts": {"sft/train": 0}, "sources": by_source})


def report(config: Config, stage: str = "sft") -> Row:
    found: Row = json.loads((draw_rows(config, stage) / "mixture.json").read_text())
    return found


def test_without_settings_every_validated_row_is_drawn_once_in_its_order(folder):
    write(folder, "a", [asked(f"q{i}", "x") for i in range(5)])
    config = settings(folder, "a.jsonl")
    validate(config)
    assert list(iter_training_rows(config, "sft")) == list(iter_rows(samples_dir(config), stage="sft", split="train"))
    assert report(config)["sources"][0]["drawn"] == 5


def test_answers_below_a_rating_are_left_out_and_rows_without_any_other(folder):
    rated = {"relevance_ratings": [5, 2], "formatting_ratings": [5, None]}
    write(folder, "a", [
        asked("q", "good", "poor", **rated),
        asked("r", "poor", "poor", relevance_ratings=[1, 2]),
        asked("s", "unrated", "unrated"),
        asked("t", "broken", relevance_ratings="high"),
    ])  # fmt: skip
    config = settings(folder, "a.jsonl, min_rating: {relevance_ratings: 3, formatting_ratings: 4}")
    validate(config)
    kept = [[turn.content for turn in sample.messages] for sample, _, _ in iter_training_rows(config, "sft")]
    assert kept == [["<image>\nq", "good"], ["<image>\ns", "unrated", "s 1", "unrated"]]
    [source] = report(config)["sources"]
    assert {key: source[key] for key in ("rows", "bad", "train", "low_rating", "low_answers", "drawn")} == {
        "rows": 4, "bad": 1, "train": 3, "low_rating": 1, "low_answers": 1, "drawn": 2,
    }  # fmt: skip


def test_the_table_gives_rows_reasons_draws_and_shares_by_source_and_task(folder):
    write(folder, "big", [asked(f"q{i}", "x", task="vqa") for i in range(8)] + [asked("q0", "X ", task="vqa")])
    write(folder, "small", [asked(f"s{i}", "x", task="ocr") for i in range(2)])
    mixture = "data.mixture.sft.duplicates=drop_equal"
    config = settings(folder, "big.jsonl, weight: 3; small.jsonl, weight: 2, repeat: 2", mixture)
    validate(config)
    big, small = report(config)["sources"]
    assert (big["rows"], big["duplicate"], big["over_weight"], big["draws"], big["share"]) == (9, 1, 2, 6, 0.6)
    assert (small["drawn"], small["draws"], small["repeats"], small["share"]) == (2, 4, 2, 0.4)
    assert [(task["name"], task["draws"]) for task in report(config)["tasks"]] == [("vqa", 6), ("ocr", 4)]
    assert len(list(iter_training_rows(config, "sft"))) == 10
    assert len(list(iter_training_rows(config, "sft", once=True))) == 8
    assert count_rows(config) == {"sft": 10}
    text = "\n".join(mixture_tables(config))
    assert "data.sft.0" in text
    assert "60.0%" in text
    assert "low_rating" not in text  # nothing was


def test_near_duplicates_are_found_in_rows_as_they_are_validated(folder):
    long = "The picture shows a plain red square without any border, evenly lit, and nothing else at all in it"
    write(folder, "a", [asked("What?", long), asked("What?", long + "."), asked("What?", long, image="blue.png")])
    config = settings(folder, "a.jsonl", "data.mixture.sft.duplicates=drop_near")
    validate(config)
    [source] = report(config)["sources"]
    assert (source["near_duplicate"], source["drawn"]) == (1, 2)


def test_pairs_are_drawn_by_repeat_time_times_repeat(folder):
    lines = [{"image": "red.png", "question": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(4)]
    write(folder, "pairs", lines)
    (folder / "meta.json").write_text(
        json.dumps({"all": {"root": "", "annotation": "pairs.jsonl", "repeat_time": 0.5}})
    )
    write(folder, "a", [asked("q", "x")])
    config = settings(folder, "a.jsonl", f"data.mpo=[{{path: {folder}/meta.json, repeat: 3}}]")
    validate(config)
    pairs = drawn_pairs(samples_dir(config), draw_rows(config, "mpo"))
    questions = [pair.question.removeprefix(f"{IMAGE_PLACEHOLDER}\n") for pair in pairs]
    assert len(questions) == 6  # 4 rows x 1.5
    assert questions == sorted(questions)
    assert set(questions) == {"0?", "1?", "2?", "3?"}


@pytest.mark.parametrize(
    ("source", "override", "message"),
    [
        ("a.jsonl, min_rating: {quality: 9}", "seed=0", r"data\.sft\.0\.min_rating leaves none of the 4 training rows"),
        ("a.jsonl, min_rating: {qualty: 1}", "seed=0", r"names 'qualty', which no row of .*a\.jsonl has"),
        ("a.jsonl, repeat: 0.1", "seed=0", r"data\.sft\.0\.repeat leaves none .* Raise it"),
        ("a.jsonl, weight: 9; a.jsonl, weight: 1", "data.mixture.sft.duplicates=drop_equal",
         r"data\.mixture\.sft\.duplicates leaves none"),
        ("a.jsonl; none.jsonl, weight: 1", "seed=0", r"data\.sft\.1\.weight: .*none\.jsonl has no training row"),
        ("a.jsonl, weight: 9; a.jsonl, weight: 0.1", "seed=0", r"data\.sft\.1\.weight leaves none"),
    ],
)  # fmt: skip
def test_settings_that_leave_nothing_are_named(folder, source, override, message):
    write(folder, "a", [asked(f"q{i}", "x", quality=5) for i in range(4)])
    write(folder, "none", [])
    config = settings(folder, source, override)
    validate(config)
    with pytest.raises(DataError, match=message) as caught:
        draw_rows(config, "sft")
    assert "\n" not in str(caught.value)
    assert not draw_dir(config, "sft").exists()


def test_settings_of_a_draw_move_their_stage_and_leave_the_validated_rows(folder):
    write(folder, "a", [asked("q", "x")])
    plain = settings(folder, "a.jsonl")
    for change in ("a.jsonl, weight: 2", "a.jsonl, repeat: 2", "a.jsonl, max_rows: 3"):
        changed = settings(folder, change)
        assert samples_dir(changed) == samples_dir(plain)
        assert draw_dir(changed, "sft") != draw_dir(plain, "sft")
        assert draw_dir(changed, "pretrain") == draw_dir(plain, "pretrain")
        moved = [run_dir(changed, stage) != run_dir(plain, stage) for stage in ("pretrain", "sft", "mpo")]
        assert moved == [False, True, True]
    near = settings(folder, "a.jsonl", "data.mixture.sft.duplicates=drop_near")
    assert samples_dir(near) != samples_dir(plain)  # signatures are made where rows are validated
    first, second = (settings(folder, f"a.jsonl, min_rating: {{r: {least}}}") for least in (1, 2))
    assert samples_dir(first) == samples_dir(second) != samples_dir(plain)
    assert draw_dir(first, "sft") != draw_dir(second, "sft")


def test_copies_are_stored_by_row_of_the_file(folder):
    write(folder, "a", [asked(f"q{i}", "x") for i in range(3)])
    config = settings(folder, "a.jsonl, repeat: 2")
    validate(config)
    stored = np.load(draw_rows(config, "sft") / "copies.npy")
    assert stored.tolist() == [0, 2, 2, 2]  # the first row is the caption


def test_features_are_wanted_of_drawn_and_held_out_rows_alone(folder):
    digests = {}
    for number, name in enumerate(("drawn", "low", "held", "chosen", "unpaired")):
        Image.new("RGB", (8, 8), (number, 99, 0)).save(folder / f"{name}.png")
        digests[name] = file_sha256(folder / f"{name}.png")
    rated = [
        asked(f"q{quality}", "x", image=f"{name}.png", quality=quality) for name, quality in (("low", 1), ("drawn", 5))
    ]
    write(folder, "a", rated)
    write(folder, "val", [asked("q", "x", image="held.png", split="val")])
    pairs = [{"image": f"{name}.png", "question": "q?", "chosen": "a", "rejected": "b", "quality": quality}
             for name, quality in (("chosen", 5), ("unpaired", 1))]  # fmt: skip
    write(folder, "pairs", pairs)
    mpo = f"data.mpo=[{{path: {folder}/pairs.jsonl, min_rating: {{quality: 2}}}}]"
    config = settings(folder, "a.jsonl, min_rating: {quality: 2}; val.jsonl", mpo)
    validate(config)
    red = file_sha256(folder / "red.png")
    assert used_pictures(config) == [red, digests["drawn"], digests["held"], digests["chosen"]]


def test_a_rating_of_a_prompt_decides_though_it_has_no_answer_turn(folder):
    write(folder, "a", [asked("q", "x")])
    prompts = [{"question": f"{quality}?", "answer": "7", "quality": quality} for quality in (1, 5)]
    write(folder, "prompts", [*prompts, {"question": "many?", "answer": "7", "quality": [5]}])
    given = f"data.prompts=[{{split: train, path: {folder}/prompts.jsonl, min_rating: {{quality: 3}}}}]"
    config = settings(folder, "a.jsonl", given)
    validate(config)
    kept = [sample.messages[0].content for sample, _, _ in iter_training_rows(config, "prompts")]
    assert kept == ["5?", "many?"]
