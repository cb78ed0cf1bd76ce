"""The factory from questions to scored pairs with a plain function in place of the model. Plain files, no cluster."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from minivlm.config import Config, ConfigError
from minivlm.config.data import DataConfig, SourceConfig
from minivlm.config.model import ClipConfig
from minivlm.config.preferences import PreferencesConfig
from minivlm.data.catalog import find_files
from minivlm.data.readers import read_rows
from minivlm.data.samples import SampleWriter, sample_columns
from minivlm.data.sources import parse_row, to_pair, to_sample
from minivlm.data.tokenizer import encode_text, load_tokenizer, train_tokenizer
from minivlm.data.tokens import TokenTable
from minivlm.inference.exports import check_reference, policy_export
from minivlm.inference.jobs import Answer, Request
from minivlm.layout import pairs_dir, run_dir, samples_dir, tokenizer_dir
from minivlm.model.checkpoint import write_manifest
from minivlm.preferences.card import CARD_FILE, pairs_metrics
from minivlm.preferences.files import read_pairs, write_unsolved
from minivlm.preferences.questions import select_questions
from minivlm.preferences.reference import add_reference_logps
from minivlm.preferences.sampling import build_pairs, make_pairs
from minivlm.schema import Message, PreferencePair, Sample
from minivlm.storage import file_sha256, write_json

ASK = "<image>\nHow many?\nAnswer the question using a single word or phrase."
TELL = "<image>\nDescribe the image."
SEEN, BLIND = "a red circle and a blue square", "no circle at all in sight"
SETTINGS: dict[str, Any] = {
    "num_samples": 4,
    "max_pairs_per_question": 3,
    "min_pairs": 1,
    "batch_size": 5,
    "max_new_tokens": 200,
}


def sample(number: int, *, task: str = "reasoning", answer: str | None = "3") -> Sample:
    stage, ask = ("prompts", ASK) if task == "reasoning" else ("pretrain", TELL)
    turns = (Message("user", ask), Message("assistant", "3"))
    digest, language = f"{number:064}", "zh" if number == 3 else "en"
    return Sample(f"{task}{number}", (f"/data/{number}.png",), (digest,), turns, stage, "train", task, language, answer)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is an export as far as preferences look at it before a model answers."""
    folder = tmp_path_factory.mktemp("checkpoint")
    words = [ASK, TELL, SEEN, BLIND, "Two and one are three.\nSo:\nFinal answer: 3 4 user assistant"]
    train_tokenizer(words, 320, folder / "export")
    write_json(folder / "export" / "config.json", {})
    (folder / "export" / "model.safetensors").write_bytes(b"weights")
    write_manifest(folder, {"stage": "sft", "step": 1})
    return folder


def make_config(root: Path, checkpoint: Path, *, questions: int = 4, captions: int = 3, **settings: Any) -> Config:
    """Questions and captions that are prepared, and a finished SFT run with this checkpoint."""
    preferences = PreferencesConfig(**SETTINGS | settings)
    config = Config(storage_path=root, clip=ClipConfig(image_size_px=16, patch_size_px=8), preferences=preferences)
    rows = [sample(i) for i in range(questions)] + [sample(i, task="caption", answer=None) for i in range(captions)]
    if not samples_dir(config).exists():
        samples_dir(config).mkdir(parents=True)
        with SampleWriter(samples_dir(config)) as writer:
            writer.add(samples=[sample_columns(row, "toy.json", i) for i, row in enumerate(rows)])
        write_json(samples_dir(config) / "summary.json", {"counts": {}, "sources": {}})
        shutil.copytree(checkpoint / "export", tokenizer_dir(config))
    paths = {"checkpoint_dir": str(checkpoint), "export_dir": str(checkpoint / "export")}
    write_json(run_dir(config, "sft") / "result.json", paths)
    return config


class Model:
    """Answers each question right, wrong and without the form in turn, questions by question more often wrong."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, unseen: str = BLIND) -> None:
        self.tokenizer, self.unseen = tokenizer, unseen
        self.asked: Counter[str] = Counter()
        self.blind: list[Request] = []

    def __call__(self, blocks: Sequence[Sequence[Request]]) -> Iterator[list[Answer]]:
        for block in blocks:
            self.asked.update(f"{r.messages[-1].content[:30]} {bool(r.response_prefix)} {r.row_id}" for r in block)
            yield [self._answer(request) for request in block]

    def _answer(self, request: Request) -> Answer:
        question, number = (int(part) for part in request.row_id.partition(":")[2].split("/"))
        if request.response_prefix:
            self.blind.append(request)
            text = ["", " " + self.unseen, SEEN[len(self.tokenizer.decode(request.response_prefix)) :]][question % 3]
        elif "Describe" in request.messages[-1].content:
            text = SEEN
        else:
            verdict = (3, 4, None)[number % 3] if question else 4
            text = f"{number} of them.\nSo:\n" + ("I do not know" if verdict is None else f"Final answer: {verdict}")
        ids = encode_text(self.tokenizer, text) if text else []
        return Answer(request.row_id, text.strip(), tuple(ids))


def score(table: Path) -> list[float]:
    return [-0.5 * entry for entry in range(len(TokenTable.open(table)))]


def run(config: Config, model: Model) -> dict[str, bytes]:
    """Everything that the factory leaves behind."""
    build_pairs(config, model)
    add_reference_logps(config, score)
    folder = pairs_dir(config)
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if not path.name.startswith(".")}


ALL = {"prompt_style": "final_answer", "dropout_ntp_tasks": ("caption",)}


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


def test_a_policy_answers_in_place_of_sft_and_stands_in_every_name(tmp_path: Path, checkpoint: Path) -> None:
    config = make_config(tmp_path / "store", checkpoint, prompt_style="final_answer")
    second = tmp_path / "step=2"
    shutil.copytree(checkpoint, second)
    (second / "export" / "model.safetensors").write_bytes(b"other weights")
    write_manifest(second, {"stage": "mpo", "step": 2})
    again = make_config(tmp_path / "store", checkpoint, policy=second / "export", prompt_style="final_answer")
    assert run_dir(again, "sft") == run_dir(config, "sft")
    assert pairs_dir(again) != pairs_dir(config)
    assert run_dir(again, "mpo") != run_dir(config, "mpo")
    assert policy_export(again).export_dir == second / "export"
    run(again, Model(load_tokenizer(checkpoint / "export")))
    check_reference(pairs_dir(again), policy_export(again))
    with pytest.raises(ConfigError, match="wrong reference"):
        check_reference(pairs_dir(again), policy_export(config))
    before = pairs_dir(again)
    second.rename(tmp_path / "moved")
    moved = make_config(
        tmp_path / "store", checkpoint, policy=tmp_path / "moved" / "export", prompt_style="final_answer"
    )
    assert pairs_dir(moved) == before  # the weights count, not their place
    (tmp_path / "moved" / "export" / "model.safetensors").write_bytes(b"third weights")
    write_manifest(tmp_path / "moved", {"stage": "mpo", "step": 3})
    assert pairs_dir(moved) != before


def test_a_manifest_beside_a_policy_counts_only_if_it_names_its_weights(tmp_path: Path, checkpoint: Path) -> None:
    """A folder of models with a manifest of somebody else's: two models are two models."""
    models = tmp_path / "models"
    for name in ("foo", "bar"):
        shutil.copytree(checkpoint / "export", models / name)
        (models / name / "model.safetensors").write_bytes(name.encode() * 4)
    for manifest in ({"version": 1}, ["foo"], {"files": {"foo/model.safetensors": "0" * 64}}, "not read", None):
        (models / "manifest.json").write_text("{" if manifest is None else json.dumps(manifest))
        given = [make_config(tmp_path / "store", checkpoint, policy=models / name) for name in ("foo", "bar")]
        assert policy_export(given[0]).reference != policy_export(given[1]).reference
        assert pairs_dir(given[0]) != pairs_dir(given[1])
        assert policy_export(given[0]).checkpoint_dir == models / "foo"
    assert (
        policy_export(make_config(tmp_path / "store", checkpoint, policy=checkpoint / "export")).reference
        == (file_sha256(checkpoint / "manifest.json")[:16])
    )


def test_without_their_tokens_pairs_are_scored_again(tmp_path: Path, checkpoint: Path) -> None:
    config = make_config(tmp_path, checkpoint, **ALL)
    expected = run(config, Model(load_tokenizer(checkpoint / "export")))
    for name in ("tokens", "reference.json"):
        path = pairs_dir(config) / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert run(config, Model(load_tokenizer(checkpoint / "export"))) == expected


def test_too_few_pairs_are_refused_after_encoding_too_and_a_lower_limit_goes_on(
    tmp_path: Path, checkpoint: Path
) -> None:
    settings = {"dropout_ntp_filter": True, **ALL}
    config = make_config(tmp_path, checkpoint, min_pairs=8, **settings)
    model = Model(load_tokenizer(checkpoint / "export"))
    build_pairs(config, model)

    def rising(table: Path) -> list[float]:
        return [float(entry) for entry in range(len(TokenTable.open(table)))]

    with pytest.raises(ConfigError, match=r"Only 7 of 8 .*likelier.*min_pairs is 8\..*preferences\.min_pairs=7"):
        add_reference_logps(config, rising)
    lower = make_config(tmp_path, checkpoint, min_pairs=7, **settings)
    assert pairs_dir(lower) == pairs_dir(config)
    assert set(model.asked.values()) == {1}
    build_pairs(lower, model)
    add_reference_logps(lower, rising)
    assert set(model.asked.values()) == {1}
    with pytest.raises(ConfigError, match="Only 7 of 8"):
        add_reference_logps(config, rising)  # finished under the lower limit
    with pytest.raises(ConfigError, match="Only 8 preference pairs came out"):
        build_pairs(make_config(tmp_path, checkpoint, min_pairs=9, **settings), model)


def test_answers_that_ran_into_the_limit_make_no_pair(tmp_path: Path, checkpoint: Path) -> None:
    """An answer of as many tokens as may be written did not end by itself."""
    model = Model(load_tokenizer(checkpoint / "export"))
    longest = len(encode_text(model.tokenizer, "2 of them.\nSo:\nI do not know"))
    config = make_config(tmp_path, checkpoint, max_new_tokens=longest, prompt_style="final_answer")
    run(config, model)
    kinds = Counter(pair.kind for pair in read_pairs(pairs_dir(config) / "pairs.parquet"))
    drops = json.loads((pairs_dir(config) / "summary.json").read_text())["drops"]
    assert kinds == {"correctness": 6}
    assert drops["answer_unfinished"] == 3
    limit = len(encode_text(model.tokenizer, SEEN)) + 1
    captions = make_config(tmp_path / "open", checkpoint, questions=0, max_new_tokens=limit, **ALL)
    message = r"continuation_unfinished': 1.*dropout_ntp_tasks"
    with pytest.raises(ConfigError, match=message) as failed:
        build_pairs(captions, Model(model.tokenizer, f"{BLIND} {BLIND}"))
    assert "No sampled answer was right" not in str(failed.value)


def test_unsolved_questions_keep_the_form_that_only_their_answer_shows(tmp_path: Path) -> None:
    turns = (Message("user", ASK), Message("assistant", "Two and one.\nFinal answer: 3"))
    write_unsolved(tmp_path, [replace(sample(1), messages=turns), replace(sample(2), messages=turns[:1])])
    [file] = find_files(str(tmp_path / "unsolved_meta.json"), None, None)
    again = [
        to_sample(parse_row(raw, {}), stage="prompts", split="train", task="x", default_id="x")
        for _, raw in read_rows(file.path)
    ]
    assert [row.messages for row in again] == [turns, turns[:1]]


def test_a_policy_that_cannot_answer_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"preferences\.policy=EXPORT"):
        policy_export(make_config(tmp_path, checkpoint, policy=tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"no export \(its `export` folder\?\)"):
        policy_export(make_config(tmp_path, checkpoint, policy=checkpoint))
    foreign = tmp_path / "foreign"
    train_tokenizer(["entirely other words"], 300, foreign)
    (foreign / "config.json").write_text("{}")
    (foreign / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"another tokenizer.*add tokenizer\.path="):
        policy_export(make_config(tmp_path, checkpoint, policy=foreign))


def test_the_card_tells_counts_reasons_and_examples(tmp_path: Path, checkpoint: Path) -> None:
    config = make_config(tmp_path, checkpoint, **ALL)
    files = run(config, Model(load_tokenizer(checkpoint / "export")))
    card = files[CARD_FILE].decode()
    assert "16 answers to 4 questions" in card
    assert "| correctness | 6 | 3 |" in card
    assert "| dropout_ntp | 1 | 1 |" in card
    assert "| answer or pair | question_without_right_answer | 1 |" in card
    assert f"path: {pairs_dir(config) / 'unsolved_meta.json'}, split: train" in card
    assert f"chosen:\n\n    {SEEN}\n" in card
    metrics = pairs_metrics(pairs_dir(config))
    assert (metrics["preferences/num_pairs"], metrics["preferences/num_unsolved"]) == (8, 1)
    assert (metrics["preferences/accuracy"], metrics["preferences/pairs/format"]) == (6 / 16, 1)
