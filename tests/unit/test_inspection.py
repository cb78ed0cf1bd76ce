"""What `jobs.inspect` says of a source."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from minivlm.config import Config, load_config
from minivlm.data.chat import encode_chat
from minivlm.data.tokenizer import load_tokenizer, train_tokenizer
from minivlm.schema import Message
from minivlm.workflow.inspection import half_blocks, inspect_source, marked_tokens
from tests.data_formats import write_all
from tests.videos import BLUE, RED, plain, write_film


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources")
    write_all(path)
    train_tokenizer(["user\nWhat colour?", "assistant\nIt is red."] * 3, 300, path / "tokenizer")
    return path


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    (folder / "empty.yaml").write_text("")
    return load_config(folder / "empty.yaml", [f"tokenizer.path={folder}/tokenizer", f"storage_path={folder}/store"])


def report(config: Config, path: Path, stage: str = "sft", preview: bool = False) -> str:
    return "\n".join(
        inspect_source(
            config, str(path), stage=stage, image_root=None, subset=None, max_rows=100, preview=preview, colour=False
        )
    )


def test_formats_counts_lengths_and_what_is_learned(config, folder):
    text = report(config, folder / "llava.json")
    assert re.search(r"format +3  LLaVA", text)
    assert re.search(r"usable +3 rows as sft, 0 bad", text)
    assert re.search(r"pictures +2 in rows, 2 distinct", text)
    assert re.search(r"language +2  en", text)
    assert "16 x 16 px" in text
    shown = text[text.index("tokens are learned") :]
    assert "<image> x " in shown
    assert "".join(re.findall(r"\[(.*?)\]", shown)) == "It is red.<|im_end|>"


def test_preferences_and_embedded_pictures(config, folder):
    text = report(config, folder / "trl.parquet", "mpo")
    assert re.search(r"format +2  TRL preference", text)
    assert re.search(r"usable +2 rows as mpo, 0 bad", text)
    assert re.search(r"pictures +2 in rows, 2 distinct", text)


def test_bad_rows_are_counted_by_reason_and_the_first_is_named(config, folder, tmp_path):
    rows = [
        {"image": "no.jpg", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}
    ]
    (tmp_path / "bad.json").write_text(json.dumps(rows * 3 + [{"text": "x"}]))
    text = report(config, tmp_path / "bad.json")
    assert re.search(r"usable +0 rows as sft, 4 bad", text)
    assert re.search(r"bad +3  image: no file 'no.jpg'", text)
    assert re.search(r"format +1  unknown", text)
    assert re.search(r"first bad +.*bad\.json, row 1: image", text)


def test_rows_of_another_stage_say_where_they_belong(config, folder):
    assert "list its file under data.mpo" in report(config, folder / "mmpr.jsonl", "sft")
    assert "no `rejected` answer" in report(config, folder / "llava.json", "mpo")


def test_every_learned_token_is_marked_and_no_other(folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    turns = [Message("user", "<image>\nWhat colour?"), Message("assistant", "It is red.")]
    ids, labels = encode_chat(tokenizer, turns, 4)
    text = marked_tokens(tokenizer, ids, labels, colour=True)
    assert text.count("\033[32m") == sum(label >= 0 for label in labels)
    assert "<image> x 4 " in text


def test_videos_show_how_many_and_the_first_ones_frames(config, tmp_path):
    write_film(tmp_path / "film.mp4", plain([RED, BLUE]))
    turns = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "x"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"video": "film.mp4", "conversations": turns}] * 3))
    text = report(config, tmp_path / "rows.json", preview=True)
    assert re.search(r"videos +3 in rows, 1 distinct; uniform, at most 8 frames", text)
    assert re.search(r"video +film.mp4: 2 frames, at 0.00 0.10 s", text)
    assert re.search(r"pictures +6 in rows, 2 distinct", text)
    frames = text[text.index("\nframe ") : text.index("\npictures ")]
    assert frames.count("48 x 32 px") == 2
    assert frames.count("\u2580") == 2 * 32 * 11


def test_a_preview_has_the_pictures_colours():
    picture = Image.new("RGB", (8, 8), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 4, 8, 8))
    lines = list(half_blocks(picture))
    assert len(lines) == 16
    assert "38;2;255;0;0" in lines[0]
    assert "48;2;0;0;255" in lines[-1]
