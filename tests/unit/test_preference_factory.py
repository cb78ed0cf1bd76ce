"""The factory from questions to scored pairs with a plain function in place of the model. Plain files, no cluster."""

import json
import os
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minivlm.config import Config, ConfigError
from minivlm.config.data import DataConfig, SourceConfig
from minivlm.data.catalog import find_files
from minivlm.data.readers import read_rows
from minivlm.data.samples import SampleWriter, sample_columns
from minivlm.data.sources import parse_row, to_pair, to_sample
from minivlm.data.tokenizer import encode_text, load_tokenizer
from minivlm.data.tokens import TokenTable
from minivlm.layout import pairs_dir, samples_dir
from minivlm.preferences.card import CARD_FILE, pairs_metrics
from minivlm.preferences.files import read_pairs, write_unsolved
from minivlm.preferences.questions import select_questions
from minivlm.preferences.reference import add_reference_logps
from minivlm.preferences.sampling import build_pairs, make_pairs
from minivlm.schema import Message, PreferencePair
from minivlm.storage import write_json
from tests.pair_factory import ALL, ASK, BLIND, SEEN, SETTINGS, TELL, Model, make_checkpoint, make_config, run, sample


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


class Killed(BaseException):
    """Stands for the end of the process."""


class Death:
    """Ends the process at one commit (a rename): all is written but its name. Nothing is tidied up then."""

    def __init__(self, patch: pytest.MonkeyPatch, commit: int) -> None:
        self.count, self.commit, self.is_dead = 0, commit, False
        for name in ("replace", "rename"):
            patch.setattr(Path, name, self._dying(getattr(Path, name)))
        remove = shutil.rmtree
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None if self.is_dead else remove(*args, **kwargs))

    def _dying(self, commit: Any) -> Any:
        def wrapped(path: Path, target: Path) -> Path:
            self.is_dead = self.count == self.commit
            self.count += 1
            if self.is_dead:
                raise Killed
            return commit(path, target)

        return wrapped


def test_a_kill_at_any_commit_loses_and_doubles_nothing(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just after a commit the folder is as just before the next one."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # the processes die, not the machine
    config = make_config(tmp_path, checkpoint, **ALL)
    model = Model(load_tokenizer(checkpoint / "export"))
    expected, once = run(config, model), model.asked
    assert set(once.values()) == {1}
    for commit in range(100):
        shutil.rmtree(pairs_dir(config))
        first, second = Model(model.tokenizer), Model(model.tokenizer)
        with monkeypatch.context() as patch:
            death = Death(patch, commit)
            with suppress(Killed):
                run(config, first)
        assert run(config, second) == expected
        again = sum((first.asked + second.asked).values()) - sum(once.values())
        assert again <= SETTINGS["batch_size"]  # only the batch that was not committed
        if not death.is_dead:
            assert commit >= 20
            return
    raise AssertionError("more commits than there can be")


def test_pairs_of_all_kinds_in_mmprs_files_read_back_as_they_are(tmp_path: Path, checkpoint: Path) -> None:
    config = make_config(tmp_path, checkpoint, **ALL)
    run(config, Model(load_tokenizer(checkpoint / "export")))
    folder = pairs_dir(config)
    pairs = read_pairs(folder / "pairs.parquet")
    assert Counter(pair.kind for pair in pairs) == {"correctness": 6, "format": 1, "dropout_ntp": 1}
    read = []
    for file in find_files(str(folder / "mmpr_meta.json"), None, None):
        assert file.repeat == 1
        for _, raw in read_rows(file.path):
            row = parse_row(raw, dict(file.columns))
            read.append((str(file.image_root / row["images"][0]), to_pair(row, default_id="x")))

    def shown(path: str, pair: PreferencePair) -> tuple[str | None, ...]:
        return (path, pair.pair_id, pair.question, pair.chosen, pair.rejected, pair.answer)

    assert {shown(*row) for row in read} == {shown(pair.images[0], pair) for pair in pairs}
    assert len(read) == len(pairs)


def test_the_stored_question_is_the_one_that_was_asked(tmp_path: Path, checkpoint: Path) -> None:
    config = make_config(tmp_path, checkpoint, prompt_style="final_answer")
    prompt = select_questions(config).known[0]
    assert prompt.question.startswith("<image>\nYour task is to answer the question below.")
    assert "single word" not in prompt.question
    run(config, Model(load_tokenizer(checkpoint / "export")))
    pairs = [pair for pair in read_pairs(pairs_dir(config) / "pairs.parquet") if pair.pair_id.startswith("reasoning1-")]
    assert {pair.question for pair in pairs} == {prompt.question}


def test_rows_are_asked_in_their_language_and_checked_by_the_form_that_was_asked_for(
    tmp_path: Path, checkpoint: Path
) -> None:
    config = make_config(tmp_path, checkpoint, prompt_style="boxed")
    prompts = select_questions(config).known
    assert [prompt.asked.style for prompt in prompts if prompt.asked] == ["boxed_en"] * 3 + ["boxed_zh"]
    assert "逐步推理" in prompts[3].question
    texts = [["One.\nTwo.\nFinal answer: 3", "One and two are three.\nAnswer: \\boxed{3}"] for _ in prompts]
    _, _, summary = make_pairs(config, prompts, texts)
    assert (summary["malformed"], summary["accuracy"]) == (0.5, 0.5)


def test_questions_that_no_answer_was_right_for_are_kept_for_another_round(tmp_path: Path, checkpoint: Path) -> None:
    config = make_config(tmp_path, checkpoint, **ALL)
    run(config, Model(load_tokenizer(checkpoint / "export")))
    [file] = find_files(str(pairs_dir(config) / "unsolved_meta.json"), None, None)
    [(_, raw)] = read_rows(file.path)
    row = parse_row(raw, {})
    again = to_sample(row, stage="prompts", split="train", task="x", default_id="x")
    assert (again.sample_id, again.messages[0].content, again.answer) == ("reasoning0", ASK, "3")
    assert (again.task, str(file.image_root / row["images"][0])) == ("reasoning", "/data/0.png")


def test_open_answers_are_continued_blindly_from_their_first_half(tmp_path: Path, checkpoint: Path) -> None:
    config = make_config(tmp_path, checkpoint, captions=6, **ALL)
    model = Model(load_tokenizer(checkpoint / "export"))
    run(config, model)
    assert len(model.blind) == 6
    ids = encode_text(model.tokenizer, SEEN)
    for request in model.blind:
        assert request.image_sha256 == ()
        assert "<image>" not in request.messages[-1].content
        assert request.response_prefix == tuple(ids[: len(ids) // 2])
    pairs = [pair for pair in read_pairs(pairs_dir(config) / "pairs.parquet") if pair.kind == "dropout_ntp"]
    known = model.tokenizer.decode(ids[: len(ids) // 2])
    assert [(pair.question, pair.chosen, pair.rejected) for pair in pairs] == [(TELL, SEEN, f"{known} {BLIND}")] * 2
    drops = json.loads((pairs_dir(config) / "summary.json").read_text())["drops"]
    assert (drops["continuation_empty"], drops["continuation_identical"]) == (2, 2)


def test_the_filter_drops_open_pairs_whose_rejected_answer_is_likelier(tmp_path: Path, checkpoint: Path) -> None:
    config = make_config(tmp_path, checkpoint, dropout_ntp_filter=True, **ALL)
    build_pairs(config, Model(load_tokenizer(checkpoint / "export")))
    add_reference_logps(config, lambda table: [float(entry) for entry in range(len(TokenTable.open(table)))])
    folder = pairs_dir(config)
    reference = json.loads((folder / "reference.json").read_text())
    assert reference["dropped"] == {"rejected likelier than chosen": 1}
    assert len(TokenTable.open(folder / "tokens")) == 2 * reference["num_pairs"] == 14
    assert list(json.loads((folder / "mmpr_meta.json").read_text())) == [
        "minivlm_correctness_rules",
        "minivlm_format_rules",
    ]
    blind = [pair for pair in read_pairs(folder / "pairs.parquet") if pair.kind == "dropout_ntp"]
    assert [pair.reference for pair in blind] == [None]


def test_a_task_that_no_row_has_is_named(tmp_path: Path, checkpoint: Path) -> None:
    config = make_config(tmp_path, checkpoint, dropout_ntp_tasks=("captoin",))
    with pytest.raises(ConfigError, match=r"captoin.*no training row.*caption, reasoning"):
        build_pairs(config, Model(load_tokenizer(checkpoint / "export")))


def test_large_sources_give_fewer_pairs_per_question(tmp_path: Path, checkpoint: Path) -> None:
    texts = [[f"{n} a\nb\nFinal answer: {3 + n % 2}" for n in range(4)]] * 4
    counts = []
    for limit in (16, 15):
        settings = {"large_source_answers": limit, "max_pairs_per_question": 4, "prompt_style": "final_answer"}
        config = make_config(tmp_path, checkpoint, max_pairs_per_large_source_question=1, **settings)
        counts.append(len(make_pairs(config, select_questions(config).known, texts)[0]))
    assert counts == [16, 4]


def test_each_source_has_its_own_verifier(tmp_path: Path, checkpoint: Path) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("charts", "counts")}
    for path in files.values():
        path.write_text("")
    given = [SourceConfig(path=str(files["charts"]), verifier="relaxed"), SourceConfig(path=str(files["counts"]))]
    config = Config(storage_path=tmp_path, data=DataConfig(pretrain=(given[0],), sft=(given[0],), prompts=tuple(given)))
    samples_dir(config).mkdir(parents=True)
    rows = [(sample(0, answer="100"), "charts"), (sample(1, answer="100"), "counts")]
    with SampleWriter(samples_dir(config)) as writer:
        for place, (row, name) in enumerate(rows):
            writer.add(samples=[sample_columns(row, str(files[name]), place)])
    write_json(samples_dir(config) / "summary.json", {"counts": {}, "sources": {}})
    prompts = select_questions(config).known
    assert [prompt.asked.verifier for prompt in prompts if prompt.asked] == ["relaxed", "exact"]
    _, unsolved, summary = make_pairs(config, prompts, [["104"], ["104"]])
    assert [prompt.sample.sample_id for prompt in unsolved] == ["reasoning1"]
    assert summary["accuracy"] == 0.5
    exact = (SourceConfig(path=str(files["charts"])), given[1])
    other = config.model_copy(update={"data": DataConfig(pretrain=(given[0],), sft=(given[0],), prompts=exact)})
    assert samples_dir(other) == samples_dir(config)
    assert pairs_dir(other) != pairs_dir(config)


def test_unsolved_questions_keep_the_form_that_only_their_answer_shows(tmp_path: Path) -> None:
    turns = (Message("user", ASK), Message("assistant", "Two and one.\nFinal answer: 3"))
    write_unsolved(tmp_path, [replace(sample(1), messages=turns), replace(sample(2), messages=turns[:1])])
    [file] = find_files(str(tmp_path / "unsolved_meta.json"), None, None)
    again = [
        to_sample(parse_row(raw, {}), stage="prompts", split="train", task="x", default_id="x")
        for _, raw in read_rows(file.path)
    ]
    assert [row.messages for row in again] == [turns, turns[:1]]


@pytest.mark.parametrize("cut", [False, True])
def test_the_card_tells_counts_reasons_and_examples(tmp_path: Path, checkpoint: Path, cut: bool) -> None:
    config = make_config(tmp_path, checkpoint, **ALL, cut_rejected=cut)
    files = run(config, Model(load_tokenizer(checkpoint / "export")))
    card = files[CARD_FILE].decode()
    assert "16 answers to 4 questions" in card
    assert "| correctness | 6 | 3 |" in card
    assert "| dropout_ntp | 1 | 1 |" in card
    assert "| answer or pair | question_without_right_answer | 1 |" in card
    assert f"path: {pairs_dir(config) / 'unsolved_meta.json'}, split: train" in card
    assert f"chosen:\n\n    {SEEN}\n" in card
    assert ("up to the end of its first line that differs" in card) is cut
    metrics = pairs_metrics(pairs_dir(config))
    assert (metrics["preferences/num_pairs"], metrics["preferences/num_unsolved"]) == (8, 1)
    assert (metrics["preferences/accuracy"], metrics["preferences/pairs/format"]) == (6 / 16, 1)
