"""Each gate refuses for its own reason, with the figure that it measured."""

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from minivlm.data.tokenizer import train_tokenizer
from minivlm.evaluation.gate import Check, check_better, check_complete, check_finite, check_reloads, examine
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


def answers(scores: list[float], task: str = "colour") -> list[dict]:
    return [
        {"task": task, "question_id": f"q{number}", "source": "", "cluster": f"picture {number // 2}", "score": score}
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
    champion, candidate = [0.0, 1.0] * 20, [0.0, 1.0] * 19 + [1.0, 1.0]
    check = check_better(answers(candidate), answers(champion), 3, SAME)
    assert refused(check, "better", "+2.50 points on champion 3, 95 % interval -2.73")
    assert "40 questions about 20 pictures: not beyond the noise" in check.measured


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
    assert refused(check_better(many, answers([0.0] * 50), 3, SAME), "better", "about one picture")


def test_the_rows_compared_are_found_by_question_not_by_place():
    rows = answers([1.0, 0.0, 1.0, 1.0])
    assert refused(check_better(rows, rows[::-1], 3, SAME), "better", "+0.00 points")


def test_other_questions_are_not_compared():
    check = check_better(answers([1.0] * 4), answers([0.0] * 3), 3, SAME)
    assert refused(check, "better", "3 of 4 questions were asked of champion 3 too; colour q3 was asked of one alone")


def test_captions_count_only_where_they_are_all_there_is_and_need_one_tokenizer():
    captions, colours = answers([1.0] * 6, "caption"), answers([0.0, 1.0] * 3)
    worse = answers([0.0] * 6, "caption")
    assert refused(check_better(captions + colours, worse + colours, 3, SAME), "better", "+0.00 points")
    assert check_better(captions, worse, 3, SAME).passed
    assert refused(
        check_better(captions, worse, 3, ("a" * 64, "b" * 64)), "better", "its tokenizer aaaaaaaaaaaa is not"
    )
