"""Which questions are asked, and that the shuffled variant never shows the right picture."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minivlm.config import Config
from minivlm.data.chat import encode_prompt
from minivlm.data.samples import SampleWriter, sample_columns
from minivlm.data.settings import num_image_tokens
from minivlm.data.tokenizer import train_tokenizer
from minivlm.evaluation.benchmarks.rows import SHORT
from minivlm.evaluation.runner import held_out_questions, questions_key
from minivlm.evaluation.tasks import Question, select_questions, shuffle_pictures
from minivlm.layout import samples_dir
from minivlm.schema import Message, Sample
from minivlm.storage import write_json


def question(number: int, task: str, pictures: tuple[str, ...]) -> Question:
    messages = (Message("user", "<image>" * len(pictures) + "What?"),)
    return Question(f"q{number}", task, "en", pictures, pictures, messages, "red", "red")


def sample(sample_id: str, stage: str, task: str, picture: str, text: str = "<image>What?") -> Sample:
    messages = (Message("user", text), Message("assistant", "It is red."))
    return Sample(sample_id, (f"/{picture}",), (picture,), messages, stage, "test", task, answer="red")


PICTURES = st.lists(st.sampled_from("abcdef"), min_size=0, max_size=2).map(tuple)


@given(st.lists(st.tuples(st.sampled_from(["colour", "count"]), PICTURES), max_size=30), st.integers(0, 5))
def test_shuffled_pictures_are_a_derangement(rows: list[tuple[str, tuple[str, ...]]], seed: int) -> None:
    questions = [question(i, task, pictures) for i, (task, pictures) in enumerate(rows)]
    shuffled = shuffle_pictures(questions, seed=seed)
    for q in shuffled:
        group = {r.image_sha256 for r in questions if r.task == q.task and len(r.images) == len(q.images)}
        if not q.images or len(group) == 1:
            assert q.wrong_sha256 is None
        else:
            assert q.wrong_sha256 in group - {q.image_sha256}
    moves = {(q.task, len(q.images), q.image_sha256, q.wrong_sha256) for q in shuffled if q.wrong_sha256}
    assert set(Counter((t, n, wrong) for t, n, _, wrong in moves).values()) <= {1}


def test_shuffling_depends_on_the_seed_only() -> None:
    questions = [question(i, "colour", (str(i),)) for i in range(20)]
    first = [q.wrong_sha256 for q in shuffle_pictures(questions, seed=0)]
    assert [q.wrong_sha256 for q in shuffle_pictures(questions[::-1], seed=0)][::-1] == first
    assert [q.wrong_sha256 for q in shuffle_pictures(questions, seed=1)] != first


def test_questions_are_sft_tasks_and_captions_of_any_stage() -> None:
    samples = [
        sample("1", "sft", "colour", "a"),
        sample("2", "pretrain", "caption", "a"),
        sample("3", "prompts", "reasoning", "a"),
    ]
    assert [q.question_id for q in select_questions(samples, max_per_task=None, seed=0)] == ["2", "1"]


def test_the_truth_is_not_in_the_prompt() -> None:
    (q,) = select_questions([sample("1", "sft", "colour", "a")], max_per_task=None, seed=0)
    assert [m.role for m in q.messages] == ["user"]
    assert (q.truth, q.reference) == ("red", "It is red.")


def test_the_same_question_about_the_same_picture_is_asked_once() -> None:
    samples = [sample("1", "sft", "colour", "a"), sample("2", "sft", "colour", "a"), sample("3", "sft", "colour", "b")]
    assert [q.question_id for q in select_questions(samples, max_per_task=None, seed=0)] == ["1", "3"]


def test_a_cap_takes_the_same_questions_every_time() -> None:
    samples = [sample(f"{i:02}", "sft", "colour", str(i)) for i in range(50)]
    first = [q.question_id for q in select_questions(samples, max_per_task=5, seed=0)]
    assert len(first) == 5
    assert [q.question_id for q in select_questions(samples[::-1], max_per_task=5, seed=0)] == first


def test_the_settings_tokenizer_says_what_is_too_long_to_ask(tmp_path: Path):
    """Not that of a model: so every model is asked the same."""
    tokenizer = train_tokenizer(["Which colour is it?"], 300, tmp_path / "tokenizer")
    for number in range(2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    long = "Is there " + "a very " * 40 + "red dog?"
    rows = [
        {"question_id": number, "image": f"{number}.png", "text": text, "label": "yes"}
        for number, text in enumerate(["Is it red?", long])
    ]
    (tmp_path / "pope.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmarks = [{"kind": "pope", "path": tmp_path / "pope.json"}]
    config = Config(
        storage_path=tmp_path / "store",
        tokenizer={"path": str(tmp_path / "tokenizer")},
        evaluation={"benchmarks": benchmarks, "max_bad_fraction": 0.5},
    )
    turns = [Message("user", f"<image>\n{long}\n{SHORT}")]
    length = len(encode_prompt(tokenizer, turns, num_image_tokens(config), num_images=1))
    config = config.model_copy(update={"model": config.model.model_copy(update={"max_length_tokens": length - 1})})
    samples_dir(config).mkdir(parents=True)
    with SampleWriter(samples_dir(config)) as writer:
        writer.add(samples=[sample_columns(sample("1", "sft", "colour", "a"), "f", 0)])
    write_json(samples_dir(config) / "summary.json", {"counts": {}, "sources": {}})
    questions, account = held_out_questions(config)
    assert [question.task for question in questions] == ["colour", "pope"]
    listed = (config.root / "benchmarks" / "pope.quarantine.jsonl").read_text()
    assert account["pope"]["bad"] == 1
    assert f"a prompt of {length} tokens" in listed


def test_other_ways_of_scoring_are_other_questions(monkeypatch: pytest.MonkeyPatch):
    asked = select_questions([sample("1", "sft", "colour", "a")], max_per_task=None, seed=0)
    before = questions_key(asked, 8)
    assert questions_key(asked, 9) != before
    monkeypatch.setattr("minivlm.evaluation.runner.SCORING", -1)
    assert questions_key(asked, 8) != before
