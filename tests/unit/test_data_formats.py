"""Every format: the same rows come out of all of them, and a row that fits none says why."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from minivlm.data.catalog import find_files
from minivlm.data.errors import DataError, RowError
from minivlm.data.formats import normalize, pictures
from minivlm.data.images import ImageLimits
from minivlm.data.readers import read_rows
from minivlm.data.validate import Checked, Rules, Source, check_rows
from tests.data_formats import CAPTIONS, CONVERSATIONS, PAIRS, PREFERENCES, TEXT, write_all
from tests.videos import VIDEO

LIMITS = ImageLimits(max_bytes=1 << 20, max_pixels=1_000_000, max_side=2000, max_aspect=20.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("formats")
    write_all(path)
    return path


def check(path: Path, stage: str, tmp_path: Path, subset: str | None = None) -> Checked:
    checked = Checked()
    for file in find_files(str(path), None, subset):
        columns = tuple(file.columns.items())
        source = Source(str(file.path), str(file.image_root), stage, "train", "caption", columns, file.repeat)
        found = check_rows(
            list(read_rows(file.path)), source, Rules(LIMITS, 0.1, 0.1, str(tmp_path / "pictures"), VIDEO, "all")
        )
        checked.samples.extend(found.samples)
        checked.pairs.extend(found.pairs)
        checked.bad.extend(found.bad)
    return checked


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_the_same_in_every_format(folder, tmp_path, name):
    checked = check(folder / name, "sft", tmp_path)
    assert checked.bad == []
    digests = [sha256((folder / f"{colour}.jpg").read_bytes()).hexdigest() for colour, _, _ in CAPTIONS]
    assert [sample["image_sha256"] for sample in checked.samples] == [(digests[0],), (digests[1],), ()]
    texts = [tuple(turn["content"] for turn in sample["messages"]) for sample in checked.samples]
    assert texts == [(question, answer) for _, question, answer in CAPTIONS] + [TEXT]
    assert [sample["language"] for sample in checked.samples] == ["en", "zh", "en"]
    for sample in checked.samples:
        assert [sha256(Path(path).read_bytes()).hexdigest() for path in sample["images"]] == [*sample["image_sha256"]]


@pytest.mark.parametrize("name", PAIRS)
def test_preferences_are_the_same_in_every_format(folder, tmp_path, name):
    checked = check(folder / name, "mpo", tmp_path)
    assert checked.bad == []
    digests = [sha256((folder / f"{colour}.jpg").read_bytes()).hexdigest() for colour, *_ in PREFERENCES]
    assert [pair["image_sha256"] for pair in checked.pairs] == [(digest,) for digest in digests]
    found = [tuple(pair[key] for key in ("question", "chosen", "rejected")) for pair in checked.pairs]
    asked = [(question.replace("<image>", "<image>\n").replace("\n\n", "\n"), *rest) for question, *rest in found]
    assert asked == [(f"<image>\n{question}", chosen, rejected) for _, question, chosen, rejected in PREFERENCES]


def test_a_folder_is_all_its_files_and_a_pattern_those_that_match(folder):
    assert len(find_files(str(folder), None, None)) == 9  # without the two catalogues
    assert [file.path.name for file in find_files(str(folder / "swift*.jsonl"), None, None)] == [
        "swift.jsonl",
        "swift_pairs.jsonl",
    ]


def test_meta_json_says_how_often_rows_are_used(folder, tmp_path):
    lines = [{"image": "red.jpg", "question": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(4)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entry = {"root": str(folder), "annotation": "many.jsonl", "repeat_time": 2.5, "length": 4}
    (tmp_path / "meta.json").write_text(json.dumps({"all": entry, "some": {**entry, "repeat_time": 0.25}}))
    pairs = check(tmp_path / "meta.json", "mpo", tmp_path).pairs
    assert [pair["repeat"] for pair in pairs] == [2.5] * 4 + [0.25] * 4  # the draw uses them so often


def test_prompts_of_mmpr_have_a_question_and_the_truth(folder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"image": "red.jpg", "question": "What colour?", "answer": "red"}) + "\n")
    source = Source(str(path), str(folder), "prompts", "train", "caption")
    (sample,) = check_rows(list(read_rows(path)), source, Rules(LIMITS, 0.1, 0.1, str(tmp_path), VIDEO, "all")).samples
    assert sample["messages"] == [{"role": "user", "content": "<image>\nWhat colour?"}]
    assert sample["answer"] == "red"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "no known format: keys text"),
        ({"conversations": "{"}, "`conversations` is text but not JSON"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "a turn needs `from`"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a part of `content`"),
        ({"texts": []}, "`texts` must be a list"),
        ({"texts": [{"user": "x"}]}, "an item of `texts`"),
        ({"prompt": "x", "chosen": 3, "rejected": "y"}, "a turn needs `from`"),
        ({"prompt": [{"role": "user", "content": "a"}] * 2, "chosen": "b", "rejected": "c"}, "exactly one question"),
        ({"messages": [{"role": "user", "content": "a"}], "rejected_response": "c"}, "the last of `messages`"),
        ({"chosen": "b", "rejected": "c"}, "no known format: keys chosen, rejected"),
        ({"__key__": "a", "jpg": b"x"}, "no caption"),
        ({"__key__": "a", "txt": "a caption"}, "a caption without a picture"),
        ({"__key__": "a", "seg.png": b"x", "txt": b"a caption"}, "a caption without a picture"),
        ({"__key__": "a", "json": {"caption": "x"}}, "its .json member must be text"),
        ({"image_bytes": "a.png", "caption": "x"}, "no `conversations`"),
        ({"texts": [{"user": "a", "assistant": "b"}], "images": [None]}, "a picture must be"),
        ({"texts": [{"user": "a", "assistant": "b"}], "images": ["a", ""]}, "a picture must be"),
        ({"question": "q", "answer": "x", "images": ["a"], "image": "b"}, "pictures under several keys: images, image"),
        ({"__key__": "a", "json": b"{"}, "its .json member is not JSON"),
        ({"__key__": "a", "txt": b"\xff"}, "its .txt member is not UTF-8"),
        ({"question": 3, "answer": "x"}, "`question` must be text"),
    ],
)
def test_a_row_that_fits_no_format_says_why(row, reason):
    with pytest.raises(RowError, match=reason):
        normalize(row)


def test_pictures_of_a_key_keep_their_numbers_order():
    members = {f"{i}.jpg": b"%d" % i for i in range(12)}
    row = normalize({"__key__": "a", **members, "jpg": b"first", "json": b'{"caption": "c", "split": "test", "id": 7}'})
    assert row["images"] == [b"first", *(b"%d" % i for i in range(12))]
    assert (row["id"], row["split"]) == ("a", "test")


def test_a_row_within_a_row_is_read_once():
    inner = json.dumps({"__key__": "b", "conversations": [{"from": "human", "value": "q"}], "txt": "x"}).encode()
    assert normalize({"__key__": "a", "json": inner})["id"] == "a"


def test_a_conversation_as_text_is_no_question():
    turns = json.dumps([{"from": "human", "value": "q"}])
    assert normalize({"conversations": turns, "chosen": "a", "rejected": "b"})["question"] == "q"


def test_a_mapped_column_wins_over_a_key_of_that_name(tmp_path):
    write_all(tmp_path)
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    row = {"shots": ["red.jpg"], "images": ["blue.jpg"], "conversations": turns}
    source = Source("x.json", str(tmp_path), "sft", "train", "caption", (("shots", "images"),))
    (sample,) = check_rows([(1, row)], source, Rules(LIMITS, 0.1, 0.1, str(tmp_path), VIDEO, "all")).samples
    assert sample["images"][0].endswith("red.jpg")


@pytest.mark.parametrize("value", [3, {}, {"bytes": None}, [3], "data:image/png,abc", "data:image/png;base64,???"])
def test_what_is_no_picture_is_refused(value):
    with pytest.raises(RowError):
        pictures(value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("meta.json", '{"a": {"length": 3}}', "entry 'a': neither MMPR's"),
        ("meta.json", '{"a": {"annotation": "x", "repeat_time": 0}}', "`repeat_time` is 0"),
        ("dataset_info.json", '{"a": {"file_name": "x"}}', "only `formatting: sharegpt`"),
        (
            "dataset_info.json",
            '{"a": {"file_name": "x", "formatting": "sharegpt", "columns": {"kto_tag": "x"}}}',
            "`columns` has kto_tag",
        ),
        ("broken.json", '{"a": ', "not JSON"),
    ],
)
def test_a_catalogue_that_cannot_be_used_says_why(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=reason):
        find_files(str(tmp_path / name), None, None)


def test_an_unknown_entry_and_an_empty_folder_say_what_there_is(folder, tmp_path):
    with pytest.raises(DataError, match="no entry 'other'"):
        find_files(str(folder / "mmpr_meta.json"), None, "other")
    with pytest.raises(DataError, match=r"No \.json, \.jsonl, \.parquet, \.tar file in"):
        find_files(str(tmp_path), None, None)


def test_a_hub_data_set_comes_from_the_hub_librarys_cache(folder, tmp_path, monkeypatch):
    revision = "0123456789012345678901234567890123456789"
    repository = tmp_path / "datasets--someone--colours"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    snapshot = repository / "snapshots" / revision / "data"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abc").write_bytes((folder / "finevision.parquet").read_bytes())
    (snapshot / "train.parquet").symlink_to(repository / "blobs" / "abc")  # as the library keeps them
    (snapshot / "dataset_infos.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (file,) = find_files("hf://datasets/someone/colours", None, "data")
    assert len(list(read_rows(file.path))) == 3
    with pytest.raises(DataError, match="hf://datasets/someone/other: cannot be downloaded"):
        find_files("hf://datasets/someone/other", None, None)
