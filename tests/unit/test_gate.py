"""Each gate refuses for its own reason, with the figure that it measured."""

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from minivlm.data.tokenizer import train_tokenizer
from minivlm.evaluation.gate import (
    Check,
    check_better,
    check_complete,
    check_finite,
    check_reloads,
    examine,
    exchange_p_value,
)
from minivlm.tracking.manifest import CARD, MANIFEST, PROVENANCE, export_digest, export_files
from tests.tiny_export import CORPUS, build_export

SAME = ("t", "t")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_export(tmp_path_factory.mktemp("gate"))


@pytest.fixture
def stored(export: Path, tmp_path: Path) -> Path:
    """The export as a registry keeps it."""
    shutil.copytree(export, tmp_path / "stored")
    (tmp_path / "stored" / CARD).write_text("# card")
    seal(tmp_path / "stored")
    return tmp_path / "stored"


def seal(folder: Path, **provenance: str) -> str:
    """Write the manifest that describes the files as they are now."""
    files = export_files(folder)
    origin = dict.fromkeys(PROVENANCE, "x") | provenance
    manifest = {"digest": export_digest(files), "files": files, "provenance": origin}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return export_digest(files)


def digest_of(folder: Path) -> str:
    return str(json.loads((folder / MANIFEST).read_text())["digest"])


def change_weight(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("linear_1.weight"))
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def answers(scores: list[float], task: str = "colour", scorer: str = "short_answer") -> list[dict]:
    """Two questions about each picture."""
    fields = {"task": task, "source": "", "scorer": scorer, "question": "Which?"}
    return [
        fields | {"question_id": f"q{number}", "cluster": f"{task} {number // 2}", "score": score}
        for number, score in enumerate(scores)
    ]


def refused(check: Check, gate: str, reason: str) -> bool:
    return check.gate == gate and check.passed is False and reason in check.measured


def test_an_intact_version_passes_the_gates_that_need_no_champion(export, stored):
    checks = examine(stored, digest_of(stored), export, {"eval/macro/accuracy": 0.5}, answers([1.0, 0.0]))
    assert [(check.gate, check.passed) for check in checks] == [("complete", True), ("finite", True), ("reloads", True)]
    assert "largest difference of a logit 0 over" in checks[2].measured
    assert "1 metrics, 2 scores" in checks[1].measured


def test_a_spoilt_file_is_named_and_nothing_behind_it_is_looked_at(export, stored):
    data = bytearray((stored / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (stored / "model.safetensors").write_bytes(bytes(data))
    checks = examine(stored, digest_of(stored), export, {}, [])
    assert refused(checks[0], "complete", "model.safetensors is damaged: its sha256 begins with")
    assert [check.passed for check in checks[1:]] == [None, None]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "more.bin").write_text("x"), "more.bin is not in its manifest.json"),
        (lambda folder: (folder / MANIFEST).unlink(), "its manifest.json is missing"),
        (lambda folder: (folder / MANIFEST).write_text("[1]"), "its manifest.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text('{"digest": "d", "files": {}}'), "is of another export (d"),
    ],
)
def test_what_is_not_as_the_manifest_says_is_refused(stored, spoil, reason):
    digest = digest_of(stored)
    spoil(stored)
    assert refused(check_complete(stored, digest), "complete", reason)


def test_a_manifest_without_processor_or_provenance_is_refused(stored):
    assert refused(check_complete(stored, seal(stored, data="")), "complete", "does not say data")
    (stored / "processor_config.json").unlink()
    assert refused(check_complete(stored, seal(stored)), "complete", "it lacks processor_config.json")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_refused(stored, value):
    change_weight(stored, value)
    check = check_finite(stored, {}, [])
    assert refused(check, "finite", "1 of 1,024 numbers of")
    assert "linear_1.weight" in check.measured


def test_a_metric_or_a_score_that_is_no_number_is_refused(stored):
    assert refused(check_finite(stored, {"eval/macro/accuracy": math.nan}, []), "finite", "eval/macro/accuracy is nan")
    assert refused(check_finite(stored, {}, answers([1.0, math.nan])), "finite", "score of colour q1 is nan")


def test_stored_weights_that_are_not_those_of_the_export_are_refused(export, stored):
    change_weight(stored, 3.0)
    check = check_reloads(stored, export)
    assert refused(check, "reloads", "largest difference of a logit")
    assert str(export) in check.measured


def test_a_tokenizer_of_another_checkpoint_is_named(stored, tmp_path):
    (tmp_path / "export").mkdir()
    train_tokenizer([*CORPUS, "more words make more entries of it " * 9], 330, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tokenizer.json", stored / "tokenizer.json")
    check = check_reloads(stored, stored)
    assert refused(check, "reloads", "its tokenizer has 330 entries for 320 embeddings: it is of another checkpoint")


def test_a_difference_within_the_noise_is_refused():
    champion, candidate = [0.0, 1.0] * 20, [1.0, 1.0] * 4 + [0.0, 0.0] * 3 + [0.0, 1.0] * 13
    check = check_better(answers(candidate), answers(champion), 3, SAME)
    assert refused(check, "better", "+2.50 points on champion 3, 95 % interval -")
    assert "p = 0.72 (by exchange 1), 40 questions about 20 pictures, 7 differ: not beyond" in check.measured


def test_a_difference_beyond_the_noise_passes():
    candidate = [1.0, 1.0, 1.0, 0.0] * 10
    check = check_better(answers(candidate), answers([0.0] * 40), 3, SAME)
    assert check.passed
    assert check.measured.startswith("+75.00 points on champion 3")


def test_what_is_worse_is_called_worse():
    check = check_better(answers([0.0] * 40), answers([1.0, 1.0, 1.0, 0.0] * 10), 3, SAME)
    assert refused(check, "better", "-75.00 points on champion 3")
    assert "worse beyond the noise" in check.measured


def test_equal_answers_are_not_better():
    assert refused(check_better(answers([1.0] * 6), answers([1.0] * 6), 3, SAME), "better", "+0.00 points")


def test_many_questions_about_one_picture_prove_nothing():
    many = [row | {"cluster": "one"} for row in answers([1.0] * 50)]
    worse = [row | {"score": 0.0} for row in many]
    assert refused(check_better(many, worse, 3, SAME), "better", "50 questions, of each task about one picture")


@pytest.mark.parametrize(
    ("right", "found"),
    [
        ([0.0], "+0.00 points on champion 3, by 0 of 50 pictures: fewer than 6"),
        ([0.0] * 4, "+50.00 points on champion 3, by 2 of 52 pictures: fewer than 6"),
    ],
)
def test_a_few_questions_of_a_rare_task_prove_nothing(right, found):
    common = answers([1.0] * 100)
    ours, theirs = answers([1.0 for _ in right], "rare"), answers(right, "rare")
    check = check_better(common + ours, common + theirs, 3, SAME)
    assert refused(check, "better", found)
    assert check.advice.startswith("Add pictures to the test")


def test_two_pictures_with_much_weight_do_not_pass_for_many():
    champion, candidate = [0.0, 1.0] * 50, [1.0, 1.0] * 4 + [0.0, 0.0] * 4 + [0.0, 1.0] * 42
    ours, theirs = answers([1.0] * 4, "rare"), answers([0.0] * 4, "rare")
    check = check_better(answers(candidate) + ours, answers(champion) + theirs, 3, SAME)
    assert refused(check, "better", "+50.00 points on champion 3, 95 % interval +4")
    assert "not beyond the noise" in check.measured


def test_a_task_about_one_picture_neither_helps_nor_hinders_and_is_named():
    candidate, rare = answers([1.0, 1.0, 1.0, 0.0] * 10), answers([0.0], "rare")
    check = check_better(candidate + rare, answers([0.0] * 40) + answers([1.0], "rare"), 3, SAME)
    assert check.passed
    assert check.measured.startswith("+75.00 points")
    assert check.measured.endswith("left out, as about one picture: rare")


def test_exchanging_few_pictures_is_the_sign_test():
    """n equal totals: 2 / 2^n; the error of 10,000 draws is below 0.0025."""
    for count in (1, 2, 5, 6):
        assert exchange_p_value([0.1] * count + [0.0] * 9) == pytest.approx(2 / 2**count, abs=0.008)
    assert exchange_p_value([0.5, 0.01, 0.01, -0.01]) == pytest.approx(0.5, abs=0.02)


def test_questions_of_equal_id_are_compared_one_by_one():
    """40 questions about 20 pictures, which all have the id 0."""
    rows = answers([1.0, 1.0, 1.0, 0.0] * 10)
    same = [row | {"question_id": "0", "question": f"Which {number % 2}?"} for number, row in enumerate(rows)]
    check = check_better(same, [row | {"score": 0.0} for row in same], 3, SAME)
    assert "+75.00 points" in check.measured
    assert "40 questions about 20 pictures" in check.measured


def test_the_rows_compared_are_found_by_question_not_by_place():
    rows = answers([1.0, 0.0, 1.0, 1.0])
    assert refused(check_better(rows, rows[::-1], 3, SAME), "better", "+0.00 points")


def test_other_questions_are_not_compared():
    check = check_better(answers([1.0] * 4), answers([0.0] * 3), 3, SAME)
    assert refused(check, "better", "3 of 4 questions were asked of champion 3 too; colour q3 was asked of one alone")


def test_captions_count_only_where_they_are_all_there_is_and_need_one_tokenizer():
    captions, colours = answers([1.0] * 16, "caption", "caption_tokens"), answers([0.0, 1.0] * 8)
    worse = answers([0.0] * 16, "caption", "caption_tokens")
    assert refused(check_better(captions + colours, worse + colours, 3, SAME), "better", "+0.00 points")
    assert check_better(captions, worse, 3, SAME).passed
    assert refused(
        check_better(captions, worse, 3, ("a" * 64, "b" * 64)), "better", "its tokenizer aaaaaaaaaaaa is not"
    )


def test_a_benchmark_of_captions_is_no_task_of_the_comparison():
    coco, colours = answers([0.9] * 16, "coco", "captions"), answers([0.0, 1.0] * 8)
    worse = answers([0.1] * 16, "coco", "captions")
    assert refused(check_better(coco + colours, worse + colours, 3, SAME), "better", "+0.00 points")
    assert check_better(coco, worse, 3, ("a" * 64, "b" * 64)).passed, "likeness of words needs no equal tokenizer"
