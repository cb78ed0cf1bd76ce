"""The files in lmms-eval's layout, by hand values; where lmms-eval is installed, read by its own tools."""

import hashlib
import json
from datetime import datetime
from pathlib import Path

import pytest

from minivlm.evaluation.harness import safe_name, write_harness_files
from minivlm.evaluation.results import read_results, read_rows
from tests.evaluations import save_evaluation, scored

DATE = datetime(2026, 11, 22, 9, 5, 7)
KEYS = {
    "results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config", "date",
    "task_hashes", "model_source", "model_name", "model_name_sanitized", "system_instruction", "system_instruction_sha",
    "fewshot_as_multiturn", "chat_template", "chat_template_sha", "start_time", "end_time",
    "total_evaluation_time_seconds",
}  # fmt: skip
"""What evaluator.py and evaluation_tracker.py of lmms-eval 0.7.3 write."""


@pytest.fixture
def results_file(tmp_path: Path) -> Path:
    picture = tmp_path / "a.png"
    rows = [
        scored(0, "there/here", "Final answer: yes", "yes", picture, shuffled="no"),
        scored(1, "there/here", "no", "yes", picture, shuffled="no"),
        scored(2, "caption", "a b", "a b", picture, shuffled=None),
    ]
    folder = save_evaluation(tmp_path / "evaluation", "org/sft", rows)
    return write_harness_files(folder, read_rows(folder), read_results(folder), date=DATE)


def test_names_and_figures_are_lmms_evals(results_file: Path) -> None:
    assert results_file.parent.name == "org__sft"
    assert {path.name for path in results_file.parent.iterdir()} == {
        "20261122_090507_results.json",
        "20261122_090507_samples_there__here.jsonl",
        "20261122_090507_samples_caption.jsonl",
    }
    written = json.loads(results_file.read_text())
    assert set(written) >= KEYS
    own = written["results"]["there/here"]
    assert (own["accuracy,none"], own["accuracy,shuffled"], own["recall,none"], own["samples"]) == (0.5, 0.0, 0.5, 2)
    assert own["accuracy_stderr_clustered,none"] == pytest.approx(0.5)
    assert written["results"]["caption"]["token_accuracy,none"] == 1.0
    assert written["n-samples"]["there/here"] == {"original": 2, "effective": 2}
    assert written["higher_is_better"]["there/here"]["f1"] is True
    assert "yes_ratio" not in written["higher_is_better"]["there/here"]


def test_samples_have_its_fields_and_the_hash_of_the_task(results_file: Path) -> None:
    lines = (results_file.parent / "20261122_090507_samples_there__here.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert (first["doc_id"], first["target"], first["input"]) == (0, "yes", "<image>\nWhich colour?")
    assert (first["resps"], first["filtered_resps"]) == (["Final answer: yes"], ["yes"])
    assert (first["accuracy"], first["accuracy_shuffled"], second["score"]) == (1.0, 0.0, 0.0)
    expected = hashlib.sha256(f"sample_0{first['doc_hash']}sample_1{second['doc_hash']}".encode()).hexdigest()
    assert json.loads(results_file.read_text())["task_hashes"]["there/here"] == expected
    assert first["doc_hash"] != second["doc_hash"]


def test_an_earlier_attempt_leaves_nothing_behind(results_file: Path) -> None:
    folder = results_file.parents[2]
    later = write_harness_files(folder, read_rows(folder), read_results(folder), date=DATE.replace(hour=10))
    assert {path.name[:15] for path in later.parent.iterdir()} == {"20261122_100507"}


def test_no_name_leaves_the_folder() -> None:
    assert safe_name("../../etc") == "__..__etc"
    assert safe_name("..") == "_"


def test_lmms_evals_own_tools_read_them(results_file: Path) -> None:
    """Run where lmms-eval is installed (docs/evaluation.md says how); skipped elsewhere."""
    pytest.importorskip("lmms_eval")
    from lmms_eval.baselines import load_baseline
    from lmms_eval.utils import make_table, sanitize_model_name

    samples = results_file.parent / "20261122_090507_samples_there__here.jsonl"
    scores, aggregated = load_baseline(str(samples), "there/here")
    assert scores == {0: 1.0, 1: 0.0}
    assert aggregated == json.loads(results_file.read_text())
    assert sanitize_model_name("org/sft") == results_file.parent.name
    table = make_table(aggregated)
    assert [cell.strip() for cell in next(row for row in table.splitlines() if "shuffled" in row).split("|")][2:8] == [
        "shuffled", "0", "accuracy", "↑", "0.0000", "±",
    ]  # fmt: skip
