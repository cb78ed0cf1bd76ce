"""Annotation files: which rows are taken, and the reason given for every other."""

import json
import time
from pathlib import Path

import pytest
from PIL import Image

from minivlm.data.errors import RowError
from minivlm.data.images import ImageLimits
from minivlm.data.readers import read_rows
from minivlm.data.samples import SampleWriter, iter_rows, load_pairs, load_pictures, load_samples
from minivlm.data.sources import parse_row, pictures_first, to_pair, to_sample
from minivlm.data.validate import Rules, Source, check_rows, choose_split
from minivlm.schema import BadRow, Message
from tests.videos import VIDEO

LIMITS = ImageLimits(max_bytes=1 << 20, max_pixels=1_000_000, max_side=2000, max_aspect=20.0)


def row(*turns: str, **extra: object) -> dict[str, object]:
    names = ["human", "gpt"]
    conversations = [{"from": names[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"conversations": conversations, **extra}


def sample(value: dict[str, object], stage: str = "sft"):
    return to_sample(parse_row(value, {}), stage=stage, split="auto", task="caption", default_id="file-3")


def test_a_llava_row_becomes_a_sample():
    value = row("<image>\n<image> Which?", "Left.", "Why?", "Red.", image=["a", "b"], id=7, answer=3, task="t")
    assert parse_row(value, {})["images"] == ["a", "b"]
    got = sample(value)
    assert (got.sample_id, got.answer, got.task, got.split) == ("7", "3", "t", "auto")
    assert got.messages[:2] == (Message("user", "<image>\n<image> Which?"), Message("assistant", "Left."))
    assert [message.role for message in got.messages] == ["user", "assistant"] * 2


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("Describe it.\n<image>", "<image>\nDescribe it."),
        ("Which? <image>\n<image>\n", "<image>\n<image>\nWhich?"),
        ("<image>\nDescribe it.", "<image>\nDescribe it."),
        ("From <image> to <image>", "From <image> to <image>"),
        ("<image>", "<image>"),
    ],
)
def test_trailing_pictures_come_first(given, kept):
    assert pictures_first(given) == kept


def test_language_is_read_off_the_text_unless_named():
    assert sample(row("<image>", "一只狗", image="a")).language == "zh"
    assert sample(row("<image>", "一只狗", image="a", language="en")).language == "en"


def test_missing_keys_get_defaults():
    got = sample(row("Hello?", "Hi."))
    assert (got.sample_id, got.images, got.task, got.language, got.answer) == ("file-3", (), "caption", "en", None)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (row("<image>", "", image="a"), "an empty answer"),
        (row("<image>", " \n", image="a"), "an empty answer"),
        (row("no placeholder", "x", image="a"), r"0 <image> placeholder\(s\) for 1 image\(s\)"),
        (row("<image><image>", "x", image="a"), r"2 <image> placeholder\(s\) for 1 image\(s\)"),
        (row("<image>", "x"), r"1 <image> placeholder\(s\) for 0 image\(s\)"),
        (row("<image>", image="a"), "no answer"),
        (row(image="a"), "no `conversations`"),
        ({"conversations": "text"}, "text but not JSON"),
        ({"conversations": []}, "no `conversations`"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "a turn needs `from`"),
        ({"conversations": [{"from": "human", "value": 3}]}, "a turn needs `from`"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "no question"),
        (row("q", "x", image=3), "a picture must be"),
        (row("q", "x", image=[{}]), "a picture must be"),
        (row("q", "x", split="dev"), "`split` is 'dev'"),
        (row("q", "x", answer=["a"]), "`answer` must be text"),
    ],
)
def test_bad_llava_rows_name_the_reason(value, reason):
    with pytest.raises(RowError, match=reason):
        sample(value)


def test_a_prompt_needs_the_truth_but_no_answer_turn():
    assert sample(row("How many?", answer="4"), "prompts").answer == "4"
    with pytest.raises(RowError, match="a prompt needs the true `answer`"):
        sample(row("How many?", "4"), "prompts")


def test_an_mmpr_question_gets_its_pictures_in_front():
    value = {"image": ["a", "b"], "question": "Same?", "chosen": "no", "rejected": "yes", "answer_gt": "no"}
    pair = to_pair(parse_row(value, {}), default_id="p-1")
    assert (pair.pair_id, pair.question, pair.answer) == ("p-1", "<image>\n<image>\nSame?", "no")


def test_many_placeholders_take_no_time():
    started = time.process_time()
    assert pictures_first("<image>" * 50_000 + "x").endswith("x")
    assert pictures_first("x " + "<image> " * 50_000).count("<image>\n") == 50_000
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"split": "test"}, "pairs are for training"),
        ({"rejected": None}, "no `rejected` answer"),
        ({"rejected": ""}, r"an empty answer \(`rejected`\)"),
        ({"chosen": " "}, r"an empty answer \(`chosen`\)"),
        ({"question": ""}, "`question` is empty"),
        ({"rejected": "yes "}, "the same"),
        ({"question": "<image><image>?"}, "2 <image> placeholder"),
    ],
)
def test_bad_mmpr_rows_name_the_reason(change, reason):
    value = {"image": "a", "question": "q", "chosen": "yes", "rejected": "no"} | change
    with pytest.raises(RowError, match=reason):
        to_pair(parse_row(value, {}), default_id="p")


def test_one_bad_line_costs_one_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"question": "q"}\n\n{"question": \n\xff\n[1]\n')
    outcomes = []
    for number, raw in read_rows(path):
        try:
            outcomes.append((number, parse_row(raw, {})))
        except RowError as error:
            outcomes.append((number, str(error)))
    assert [number for number, _ in outcomes] == [1, 3, 4, 5]
    assert outcomes[0][1]["conversations"] == [{"from": "human", "value": "q"}]
    assert [outcome[1][:8] for outcome in outcomes[1:]] == ["not JSON", "not JSON", "a row mu"]


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(RowError, match="surrogate"):
        parse_row(json.loads('{"question": "\\ud800"}'), {})
    with pytest.raises(RowError, match="surrogate"):
        parse_row({"conversations": '[{"from": "human", "value": "\\ud800"}]'}, {})


def test_splits_follow_the_picture_and_its_shares():
    assert [choose_split(f"{i:x}" * 64, 0.25, 0.25) for i in (0, 3, 4, 7, 8, 15)] == [
        "test",
        "test",
        "val",
        "val",
        "train",
        "train",
    ]


def test_a_row_with_a_held_out_picture_is_held_out(tmp_path):
    names = [f"{i}.png" for i in range(12)]
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / name)
    source = Source(str(tmp_path / "f.json"), str(tmp_path), "sft", "auto", "caption")
    rules = Rules(LIMITS, 0.3, 0.3, "", VIDEO, "all")
    alone = check_rows([(i, row("<image>", "x", image=name)) for i, name in enumerate(names)], source, rules).samples
    split = {sample["images"][0]: sample["split"] for sample in alone}
    assert set(split.values()) == {"train", "val", "test"}
    pairs = [[names[i], names[j]] for i in range(12) for j in range(12)]
    both = check_rows([(i, row("<image><image>", "x", image=p)) for i, p in enumerate(pairs)], source, rules).samples
    for sample in both:
        kept = {split[picture] for picture in sample["images"]}
        assert sample["split"] == ("test" if "test" in kept else "val" if "val" in kept else "train")


def test_check_rows_resolves_digests_and_sets_aside(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "page.jpg").write_text("<html>")
    rows = [
        (1, row("<image>", "x", image="a.png")),
        (2, row("<image>", "x", image="page.jpg")),
        (3, row("<image>", "x", image="../../etc/passwd")),
        (4, row("<image>", "y", image="a.png")),
    ]
    source = Source(str(tmp_path / "f.json"), str(tmp_path), "sft", "train", "caption")
    checked = check_rows(rows, source, Rules(LIMITS, 0.1, 0.1, "", VIDEO, "all"))
    assert [item["row"] for item in checked.samples] == [1, 4]
    assert checked.samples[0]["images"] == (str(tmp_path / "a.png"),)
    assert checked.samples[0]["image_sha256"] == checked.samples[1]["image_sha256"]
    assert [(bad.row, bad.reason.split(" (")[0]) for bad in checked.bad] == [
        (2, "image 'page.jpg': not a readable picture"),
        (3, "image: '../../etc/passwd' leaves the image root"),
    ]


def test_a_picture_replaced_between_two_runs_is_read_again(tmp_path):
    source = Source(str(tmp_path / "f.json"), str(tmp_path), "sft", "train", "caption")
    digests = []
    for size in (8, 9):
        Image.new("RGB", (size, size)).save(tmp_path / "a.png")
        checked = check_rows(
            [(1, row("<image>", "x", image="a.png"))], source, Rules(LIMITS, 0.1, 0.1, "", VIDEO, "all")
        )
        digests.append(checked.samples[0]["image_sha256"])
    assert digests[0] != digests[1]


def test_samples_and_pairs_round_trip(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rules = Rules(LIMITS, 0.1, 0.1, "", VIDEO, "all")
    sft = Source("f.json", str(tmp_path), "sft", "val", "caption")
    mpo = Source("p.jsonl", str(tmp_path), "mpo", "train", "caption")
    samples = check_rows([(5, row("<image> 颜色?", "红", image="a.png", answer="红"))], sft, rules)
    line = json.dumps({"image": "a.png", "question": "q", "chosen": "c", "rejected": "r"}).encode()
    pairs = check_rows([(6, line)], mpo, rules)
    with SampleWriter(tmp_path) as writer:
        writer.add(samples.samples, pairs.pairs, [BadRow("f.json", 9, "reason")])
    ((loaded, file, number),) = iter_rows(tmp_path)
    assert (loaded.messages[0].content, loaded.answer, file, number) == ("<image> 颜色?", "红", "f.json", 5)
    assert load_samples(tmp_path, stage="sft", split="val") == [loaded]
    assert load_samples(tmp_path, split="train") == []
    (pair,) = load_pairs(tmp_path)
    assert (pair.question, pair.chosen, pair.rejected, pair.ref_chosen_logps) == ("<image>\nq", "c", "r", None)
    assert load_pictures(tmp_path) == {loaded.image_sha256[0]: str(Path(tmp_path) / "a.png")}
    assert json.loads((tmp_path / "quarantine.jsonl").read_text()) == {"file": "f.json", "row": 9, "reason": "reason"}
