"""What is asked, what is made of the answers, and pairs that the user brings. Plain files, no cluster."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from minivlm.config import Config
from minivlm.config.data import DataConfig, SourceConfig
from minivlm.config.preferences import PreferencesConfig
from minivlm.data.errors import DataError
from minivlm.data.miniworld.reasoning import PROMPT
from minivlm.data.samples import SampleWriter, pair_columns, sample_columns
from minivlm.data.tokenizer import train_tokenizer
from minivlm.layout import pairs_dir, samples_dir
from minivlm.preferences.files import read_pairs, write_mmpr
from minivlm.preferences.questions import select_questions
from minivlm.preferences.reference import encode_pairs
from minivlm.preferences.sampling import build_pairs, make_pairs
from minivlm.schema import Message, PreferencePair, Sample
from minivlm.storage import write_json

ASK = '<image>\nHow many?\nUse the format "Final answer: .."'


def sample(number: int, *, stage: str = "prompts", split: str = "train", answer: str | None = "3") -> Sample:
    turns = (Message("user", ASK), Message("assistant", "3"))
    return Sample(f"s{number}", ("/a/b.png",), (f"{number:064}",), turns, stage, split, "reasoning", "en", answer)


def pair(number: int, chosen: str = "2 + 1\nFinal answer: 3") -> PreferencePair:
    images, digests = (f"/data/images/{number}.png",), (f"{number:064}",)
    return PreferencePair(f"p{number}", images, digests, ASK, chosen, "1\nFinal answer: 1", "3")


def save(config: Config, samples: Sequence[Sample] = (), pairs: Sequence[PreferencePair] = ()) -> None:
    samples_dir(config).mkdir(parents=True)
    with SampleWriter(samples_dir(config)) as writer:
        writer.add(samples=[sample_columns(s, "f", i) for i, s in enumerate(samples)])
        writer.add(pairs=[pair_columns(p, "f", i, "reasoning") for i, p in enumerate(pairs)])
    write_json(samples_dir(config) / "summary.json", {"counts": {}, "sources": {}})


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(storage_path=tmp_path, preferences=PreferencesConfig(max_pairs_per_question=2, num_samples=3))


@pytest.mark.parametrize(
    ("ask", "reasoned"), [(ASK, True), (f"<image>\nHow many? {PROMPT}", True), ("<image>\nHow many?", False)]
)
def test_a_chain_of_thought_is_expected_where_the_question_asks_for_one(config: Config, ask: str, reasoned: bool):
    asked = replace(sample(0), messages=(Message("user", ask), Message("assistant", "3")))
    save(config, [asked])
    [prompt] = select_questions(config).known
    assert prompt.asked is not None
    assert prompt.asked.reasoned is reasoned
    assert prompt.question == ask


def test_prompts_need_a_known_answer_and_one_turn(config: Config) -> None:
    two_turns = sample(1)
    two_turns = Sample(**{**two_turns.__dict__, "messages": two_turns.messages * 2})
    save(config, [sample(0), two_turns, sample(2, answer=None), sample(0, stage="sft"), sample(0)])
    questions = select_questions(config)
    assert [p.sample.sample_id for p in questions.known] == ["s0"]
    assert questions.skipped == {"not_single_turn": 1, "no_known_answer": 1, "asked_twice": 1}


def test_held_out_prompts_are_not_asked(config: Config) -> None:
    save(config, [sample(0), sample(1, split="test"), sample(2, split="val")])
    assert [p.sample.sample_id for p in select_questions(config).known] == ["s0"]


def test_without_prompts_the_sft_training_rows_are_asked(config: Config) -> None:
    save(config, [sample(0, stage="sft"), sample(1, stage="sft", split="test"), sample(2, stage="pretrain")])
    assert [p.sample.sample_id for p in select_questions(config).known] == ["s0"]


def test_nothing_to_verify_is_an_error(config: Config) -> None:
    save(config, [sample(0, stage="sft", answer=None)])
    with pytest.raises(DataError, match=r"data\.prompts"):
        select_questions(config)


def test_counts_of_made_pairs(config: Config) -> None:
    save(config, [sample(i) for i in range(3)])
    prompts = select_questions(config).known
    right, wrong = "2 + 1\nFinal answer: 3", "2 + 2\nFinal answer: 4"
    pairs, unsolved, summary = make_pairs(
        config, prompts, [[right, wrong, "3"], [right, right, right], [wrong, wrong, "3"]]
    )
    assert [(p.pair_id, p.question, p.chosen, p.rejected) for p in pairs] == [("s0-0", ASK, right, wrong)]
    assert [prompt.sample.sample_id for prompt in unsolved] == ["s2"]
    assert summary["accuracy"] == pytest.approx(4 / 9)
    assert summary["malformed"] == pytest.approx(2 / 9)
    assert summary["drops"] == {
        "format_over_minority": 1,
        "identical_text": 3,
        "question_all_right": 1,
        "question_without_right_answer": 1,
    }


def test_pairs_of_the_user_are_taken_over_unchanged(tmp_path: Path) -> None:
    source = SourceConfig(path=str(tmp_path / "mine.jsonl"))
    config = Config(storage_path=tmp_path, data=DataConfig(pretrain=(source,), sft=(source,), mpo=(source,)))
    save(config, pairs=[pair(0), pair(1)])
    assert config.preferences.min_pairs > 2
    folder = build_pairs(config)
    assert folder == pairs_dir(config)
    assert read_pairs(folder / "pairs.parquet") == [pair(0), pair(1)]


def test_mmpr_rows_are_relative_to_their_root_and_apart_by_kind(tmp_path: Path) -> None:
    write_mmpr(tmp_path, [pair(0), replace(pair(2), kind="format"), pair(1)])
    rows = [json.loads(line) for line in (tmp_path / "minivlm_correctness_rules.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == ["0.png", "1.png"]
    assert rows[0]["question"] == ASK.removeprefix("<image>\n")
    assert (rows[0]["chosen"], rows[0]["answer_gt"]) == (pair(0).chosen, "3")
    meta = json.loads((tmp_path / "mmpr_meta.json").read_text())
    assert {name: (entry["root"], entry["length"]) for name, entry in meta.items()} == {
        "minivlm_correctness_rules": ("/data/images", 2),
        "minivlm_format_rules": ("/data/images", 1),
    }
    write_mmpr(tmp_path, [pair(0)])
    assert not (tmp_path / "minivlm_format_rules.jsonl").exists()


def test_pairs_are_encoded_side_by_side_and_long_ones_counted(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([ASK, pair(0).chosen, pair(0).rejected], 300, tmp_path / "tokenizer")
    pairs = [pair(0), pair(1, chosen="1 + " * 500 + "\nFinal answer: 3"), pair(2)]
    encoded, kept, dropped = encode_pairs(pairs, tokenizer, 5, max_length=200, cut_rejected=False)
    assert [entry.sample_id for entry in encoded] == ["p0/chosen", "p0/rejected", "p2/chosen", "p2/rejected"]
    assert kept == [0, 2]
    assert dropped.total() == 1
    learned = [int(i) for i in encoded[1].labels if i != -100]
    assert tokenizer.decode(learned) == "1\nFinal answer: 1<|im_end|>"


def cut_pair(tmp_path: Path, chosen: str, rejected: str, kind: str = "correctness") -> tuple[str, str]:
    """What is learned of both answers once the rejected one is cut."""
    tokenizer = train_tokenizer([ASK, "red2, blue1", "\n2x3=6"], 300, tmp_path / "tokenizer")
    one = replace(pair(0), chosen=chosen, rejected=rejected, kind=kind)
    encoded, _, _ = encode_pairs([one], tokenizer, 5, max_length=500, cut_rejected=True)
    assert all(entry.labels[0] == -100 and len(entry.labels) == len(entry.input_ids) for entry in encoded)
    ours, theirs = (tokenizer.decode([int(i) for i in entry.labels if i != -100]) for entry in encoded)
    return ours, theirs


@pytest.mark.parametrize(
    ("chosen", "rejected", "counted"),
    [
        ("red2, blue1\n2-1=1\nFinal answer: 1", "red3, blue1\n3-1=2\nFinal answer: 2", "red3, blue1\n"),
        ("red2, blue1\n2-1=1\nFinal answer: 1", "red2, blue1\n2-1=2\nFinal answer: 2", "red2, blue1\n2-1=2\n"),
        ("a\nb\nFinal answer: 1", "a\nb\nFinal answer: 2", "a\nb\nFinal answer: 2<|im_end|>"),
        ("a\nFinal answer: 1", "a\nb\nFinal answer: 1", "a\nb\n"),
        ("red", "blue", "blue<|im_end|>"),
    ],
)
def test_a_wrong_answer_counts_up_to_the_end_of_its_first_wrong_line(tmp_path, chosen, rejected, counted) -> None:
    assert cut_pair(tmp_path, chosen, rejected) == (f"{chosen}<|im_end|>", counted)


def test_answers_of_another_form_are_not_cut(tmp_path: Path) -> None:
    chosen, rejected = "red2\nFinal answer: 2", "red2\nblue1"
    assert cut_pair(tmp_path, chosen, rejected, kind="format") == (f"{chosen}<|im_end|>", f"{rejected}<|im_end|>")
