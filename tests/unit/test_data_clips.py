"""Rows with videos: their frames become pictures of the row, in the places of `<video>`."""

import io
import json
import pickle
import tarfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minivlm.data import clips as clips_module
from minivlm.data.batches import payload_block
from minivlm.data.catalog import find_files
from minivlm.data.clips import Clip, Kept, keep_picture, place_frames
from minivlm.data.errors import RowError
from minivlm.data.images import ImageLimits
from minivlm.data.readers import list_parts, read_rows
from minivlm.data.validate import Checked, Rules, Source, check_rows, choose_split, read_chunks
from tests.videos import BLUE, RED, VIDEO, plain, write_animation, write_film

LIMITS = ImageLimits(max_bytes=1 << 20, max_pixels=100_000, max_side=400, max_aspect=20.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """film.mp4 of two frames, red and blue; moving.gif of the same; still.png."""
    path = tmp_path_factory.mktemp("videos")
    write_film(path / "film.mp4", plain([RED, BLUE]))
    write_animation(path / "moving.gif", plain([RED, BLUE]), 100)
    Image.new("RGB", (16, 16), "white").save(path / "still.png")
    return path


@pytest.fixture
def rules(tmp_path: Path) -> Rules:
    return Rules(LIMITS, 0.1, 0.1, str(tmp_path / "pictures"), VIDEO, "all")


def check(rows: list[Any], folder: Path, rules: Rules, stage: str = "sft", split: str = "train") -> Checked:
    source = Source(str(folder / "rows.json"), str(folder), stage, split, "caption")
    return check_rows(list(enumerate(rows, start=1)), source, rules)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def colour(path: str) -> str:
    red, _, blue = Image.open(path).convert("RGB").getpixel((8, 8))
    return "white" if min(red, blue) > 200 else "red" if red > blue else "blue"


def clip(*frames: str) -> Clip:
    return Clip("d", tuple(Kept(f"/{name}", name) for name in frames), (0.0,) * len(frames))


@pytest.mark.parametrize(
    ("text", "images", "expected", "order"),
    [
        ("<video>\nWhat?", [], "<image>\n<image>\nWhat?", "ab"),
        ("What?\n<video>", [], "What?\n<image>\n<image>", "ab"),
        ("<image> or <video>?", ["i"], "<image> or <image>\n<image>?", "iab"),
        ("<video> or <image>?", ["i"], "<image>\n<image> or <image>?", "abi"),
        ("<image>\nWhat?", [], "<image>\n<image>\nWhat?", "ab"),  # LLaVA-Video
        ("What?", [], "<image>\n<image>\nWhat?", "ab"),
        ("<image>\nWhat?", ["i"], "<image>\n<image>\n<image>\nWhat?", "abi"),
    ],
)
def test_frames_take_the_places_of_the_video(text, images, expected, order):
    placed = place_frames({"conversations": turns(text, "<video> x"), "images": images}, [clip("a", "b")])
    assert [turn["value"] for turn in placed["conversations"]] == [expected, "<video> x"]
    assert "".join(getattr(image, "digest", image) for image in placed["images"]) == order


def test_two_videos_in_two_turns_keep_their_order():
    row = {"conversations": turns("<video>?", "x", "and <video>?", "y"), "images": []}
    placed = place_frames(row, [clip("a", "b"), clip("c")])
    assert [image.digest for image in placed["images"]] == ["a", "b", "c"]
    assert placed["conversations"][2]["value"] == "and <image>?"


@pytest.mark.parametrize(
    ("text", "images", "reason"),
    [
        ("<video><video>?", [], r"2 <video> placeholder\(s\) for 1 video\(s\)"),
        ("<video><image>?", [], r"1 <image> placeholder\(s\) for 0 image\(s\)"),
        ("<image><image>?", [], r"2 <image> placeholder\(s\) for 0 image\(s\)"),
    ],
)
def test_places_unlike_the_videos_are_refused(text, images, reason):
    with pytest.raises(RowError, match=reason):
        place_frames({"conversations": turns(text, "x"), "images": images}, [clip("a")])


def test_a_video_becomes_pictures_that_are_kept(folder, rules):
    checked = check([{"video": "film.mp4", "conversations": turns("What?\n<video>", "x")}], folder, rules)
    (sample,) = checked.samples
    assert checked.bad == []
    assert sample["messages"][0]["content"] == "<image>\n<image>\nWhat?"
    assert [colour(path) for path in sample["images"]] == ["red", "blue"]
    assert [sha256(Path(path).read_bytes()).hexdigest() for path in sample["images"]] == [*sample["image_sha256"]]
    assert [(name, len(found.frames), found.seconds) for name, found in checked.videos] == [("film.mp4", 2, (0.0, 0.1))]


def test_every_format_names_videos(folder, rules):
    question, answer = "<video>\nWhat?", "It moves."
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    parts = [{"type": "video"}, {"type": "text", "text": "What?"}]
    rows = [
        {"id": "1", "video": "film.mp4", "conversations": turns("<image>\nWhat?", answer)},  # LLaVA-Video
        {"videos": ["film.mp4"], "messages": chat},  # ms-swift
        {"videos": ["film.mp4"], "messages": [{"role": "user", "content": parts}, chat[1]]},  # OpenAI's parts
        {"videos": ["film.mp4"], "conversations": turns(question, answer)},  # LLaMA-Factory
        {"videos": [(folder / "film.mp4").read_bytes()], "texts": [{"user": "What?", "assistant": answer}]},
    ]
    checked = check(rows, folder, rules)
    assert checked.bad == []
    assert {json.dumps([sample["messages"], sample["image_sha256"]]) for sample in checked.samples} == {
        json.dumps([checked.samples[0]["messages"], checked.samples[0]["image_sha256"]])
    }
    assert checked.samples[0]["messages"][0]["content"] == "<image>\n<image>\nWhat?"


def test_columns_of_a_catalogue_may_name_videos(folder, tmp_path, rules):
    (tmp_path / "rows.json").write_text(json.dumps([{"films": ["film.mp4"], "talk": turns("<video>?", "x")}]))
    entry = {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "talk", "videos": "films"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": entry}))
    (file,) = find_files(str(tmp_path / "dataset_info.json"), folder, None)
    source = Source(str(file.path), str(file.image_root), "sft", "train", "caption", tuple(file.columns.items()))
    checked = check_rows(list(read_rows(file.path)), source, rules)
    assert [len(sample["images"]) for sample in checked.samples] == [2]


def test_members_of_a_tar_may_be_videos(folder, tmp_path, rules):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (("k.mp4", (folder / "film.mp4").read_bytes()), ("k.txt", b"Red, then blue.")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (sample,) = check([row for _, row in read_rows(tmp_path / "a.tar")], folder, rules).samples
    assert sample["messages"][0]["content"] == "<image>\n<image>\nDescribe the video."
    assert [colour(path) for path in sample["images"]] == ["red", "blue"]


def test_a_preference_may_be_about_a_video(folder, rules):
    row = {"videos": ["film.mp4"], "question": "<video>?", "chosen": "a", "rejected": "b"}
    (pair,) = check([row], folder, rules, "mpo").pairs
    assert (pair["question"], len(pair["images"])) == ("<image>\n<image>?", 2)


def test_an_animation_is_one_picture_as_an_image_and_many_as_a_video(folder, rules):
    rows = [{key: "moving.gif", "conversations": turns("What?\n<image>", "x")} for key in ("image", "video")]
    still, moving = check(rows, folder, rules).samples
    assert [colour(path) for path in still["images"]] == ["red"]
    assert [colour(path) for path in moving["images"]] == ["red", "blue"]


def test_the_word_video_is_text_where_there_is_none(folder, rules):
    (sample,) = check([{"conversations": turns("What does <video> do in HTML?", "x")}], folder, rules).samples
    assert sample["messages"][0]["content"] == "What does <video> do in HTML?"


def test_frames_go_where_their_video_belongs(folder, rules):
    row = {"video": "film.mp4", "conversations": turns("<video>?", "x")}
    for share in (0.0, 0.4, 0.8):
        (sample,) = check([row], folder, replace(rules, test_fraction=share), split="auto").samples
        digest = sha256((folder / "film.mp4").read_bytes()).hexdigest()
        assert sample["split"] == choose_split(digest, rules.val_fraction, share)


def test_bad_videos_cost_their_rows_and_say_why(folder, rules):
    (folder / "page.mp4").write_text("<html>")
    names = ["page.mp4", "none.mp4", "../film.mp4", "/etc/passwd", "https://example.org/a.mp4", "still.png"]
    checked = check([{"video": name, "conversations": turns("<video>?", "x")} for name in names], folder, rules)
    checked.bad.extend(check([{"videos": [b"<html>"], "conversations": turns("<video>?", "x")}], folder, rules).bad)
    assert checked.samples == []
    assert [(bad.row, bad.reason) for bad in checked.bad] == [
        (1, "video 'page.mp4': not a video that is read: mp4, mov, webm, mkv, avi, animated GIF or WebP"),
        (2, f"video: no file 'none.mp4' under {folder}"),
        (3, "video: '../film.mp4' leaves the image root"),
        (4, "video: '/etc/passwd' is not relative to the image root"),
        (5, "video: 'https://example.org/a.mp4' is not relative to the image root"),
        (6, "video 'still.png': not a video that is read: mp4, mov, webm, mkv, avi, animated GIF or WebP"),
        (1, "video in the row: not a video that is read: mp4, mov, webm, mkv, avi, animated GIF or WebP"),
    ]


def test_a_video_is_decoded_once_and_again_only_if_its_frames_are_gone(folder, rules, tmp_path):
    row = {"video": "film.mp4", "conversations": turns("<video>?", "x")}
    first = check([row], folder, rules)
    (record,) = (tmp_path / "pictures" / "clips").rglob("*.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"seconds": [7.0, 8.0]}))
    clips_module._open_file.cache_clear()  # as in another process
    assert check([row], folder, rules).videos[0][1].seconds == (7.0, 8.0)
    Path(first.samples[0]["images"][1]).unlink()
    clips_module._open_file.cache_clear()
    assert check([row], folder, rules).videos[0][1].seconds == (0.0, 0.1)
    assert Path(first.samples[0]["images"][1]).exists()
    other = replace(rules, video=replace(VIDEO, num_frames=1))
    assert len(check([row], folder, other).samples[0]["images"]) == 1


def test_rows_with_videos_are_shared_out_in_smaller_chunks(tmp_path, rules):
    rows = [{"video": "a.mp4", "conversations": turns("<video>?", "x")}] * 40
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    source = Source(str(tmp_path / "rows.json"), str(tmp_path), "sft", "train", "caption")
    (part,) = list_parts(tmp_path / "rows.json")
    chunks = [table["payload"][0].as_py() for table in read_chunks(payload_block((part, source, rules)))]
    assert [len(pickle.loads(chunk)[0]) for chunk in chunks] == [16, 16, 8]


def test_first_keeps_a_conversation_up_to_the_end_of_its_first_answer(folder, rules):
    talk = turns("<image>\nWhat?", "White.", "And <image>?", "White too.")
    rows = [{"images": ["still.png", "moving.gif"], "conversations": [{"from": "system", "value": "Be brief."}, *talk]}]
    whole, cut = (check(rows, folder, replace(rules, turns=kept)).samples[0] for kept in ("all", "first"))
    assert [turn["content"] for turn in whole["messages"]] == [turn["value"] for turn in rows[0]["conversations"]]
    assert [turn["content"] for turn in cut["messages"]] == ["Be brief.", "<image>\nWhat?", "White."]
    assert (len(whole["images"]), cut["images"]) == (2, whole["images"][:1])


def test_ratings_of_answers_that_were_left_out_go_too(folder, rules):
    row = {"conversations": turns("What?", "White.", "And?", "Red."), "score": [5, 1]}
    source = Source("rows.json", str(folder), "sft", "train", "caption", rating_columns=("score",))
    for kept, expected in (("all", [[5.0, 1.0]]), ("first", [[5.0]])):
        (sample,) = check_rows([(1, row)], source, replace(rules, turns=kept)).samples
        assert sample["ratings"] == expected


def test_first_keeps_a_greeting_and_the_first_answer_to_a_question(folder, rules):
    talk = [{"from": "gpt", "value": "Hello!"}, *turns("<image>\nWhat?", "White.", "And?", "Red.")]
    (cut,) = check([{"image": "still.png", "conversations": talk}], folder, replace(rules, turns="first")).samples
    assert [turn["content"] for turn in cut["messages"]] == ["Hello!", "<image>\nWhat?", "White."]
    assert len(cut["images"]) == 1


def test_a_question_about_a_video_that_the_row_does_not_name_is_bad(folder, rules):
    rows = [{"clip": "film.mp4", "conversations": turns(text, "x")} for text in ("<video>\nWhat?", "What?\n<video>\n")]
    found = check(rows, folder, rules)
    assert [bad.reason for bad in found.bad] == [
        "a question about a <video>, but no `video` or `videos` in the row"
    ] * 2
    pair = {"question": "<video>\nWhat?", "chosen": "a", "rejected": "b"}
    assert len(check([pair], folder, rules, stage="mpo").bad) == 1


def test_a_kept_picture_that_a_power_cut_emptied_is_written_again(folder, rules):
    data = (folder / "still.png").read_bytes()
    kept = keep_picture(data, rules.limits, rules.pictures_dir)
    Path(kept.path).write_bytes(b"")
    assert keep_picture(data, rules.limits, rules.pictures_dir) == kept
    assert Path(kept.path).read_bytes() == data
