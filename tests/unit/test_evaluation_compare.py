"""Models against a baseline, from the files of their evaluations to the printed lines."""

import json
from pathlib import Path
from typing import Any

import pytest

from minivlm.config import ConfigError
from minivlm.evaluation.compare import choose_baseline, compare_runs, comparison_lines, write_comparisons
from minivlm.evaluation.results import read_results
from minivlm.storage import write_bytes, write_json


def rows(task: str, scores: list[float]) -> list[dict[str, Any]]:
    scorer = {"caption": "caption_tokens", "coco": "captions"}.get(task, "short_answer")
    same = {"task": task, "scorer": scorer}
    return [same | {"question_id": f"{task}{n}", "score": score, "cluster": str(n)} for n, score in enumerate(scores)]


def evaluation(folder: Path, name: str, scored: list[dict[str, Any]]) -> Path:
    write_bytes(folder / name / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in scored).encode())
    write_json(folder / name / "results.json", {"name": name, "reference": f"of {name}", "comparisons": {}})
    return folder / name


def test_the_baseline_is_the_one_asked_for_else_sft_else_the_first() -> None:
    assert choose_baseline(["pretrain", "sft", "mpo"], None) == "sft"
    assert choose_baseline(["SFT", "DPO"], None) == "SFT"
    assert choose_baseline(["sft", "mpo"], "mpo") == "mpo"
    with pytest.raises(ConfigError, match=r"evaluation\.baseline=dpo is not among .* type one of sft, mpo"):
        choose_baseline(["sft", "mpo"], "dpo")


def test_every_model_is_compared_with_the_baseline(tmp_path: Path) -> None:
    folders = [
        evaluation(tmp_path, "sft", rows("colour", [1, 0, 0, 0]) + rows("caption", [0.5, 0.5]) + rows("coco", [0, 0])),
        evaluation(tmp_path, "mpo", rows("colour", [1, 1, 0, 0]) + rows("caption", [0.5, 0.7]) + rows("coco", [1, 1])),
    ]
    write_comparisons(folders, "sft")
    assert read_results(folders[0])["comparisons"] == {}
    found = read_results(folders[1])["comparisons"]["sft"]
    # Differences 0, 1, 0, 0: error^2 = 4/3 * (3 * .25^2 + .75^2) / 16 = .0625; t = 1 with 3 degrees: p = .391002.
    colour = found["tasks"]["colour"]
    assert (colour["difference"], colour["error"]) == pytest.approx((0.25, 0.25))
    assert colour["p_value"] == pytest.approx(0.391002, abs=1e-6)
    assert found["macro"] == colour
    assert found["caption"]["difference"] == pytest.approx(0.1)
    assert found["reference"] == "of sft"
    lines = comparison_lines([read_results(folder) for folder in folders])
    assert lines[1].split()[:3] == ["mpo", "-", "sft"]
    assert lines[3].split() == ["colour", "+25.0", "-54.6", "to", "+104.6", "0.3910", "70.0"]


def test_comparing_again_changes_nothing_and_another_baseline_replaces(tmp_path: Path) -> None:
    folders = [evaluation(tmp_path, name, rows("colour", [1, 0])) for name in ("sft", "mpo")]
    write_comparisons(folders, "sft")
    before = (folders[1] / "results.json").stat().st_mtime_ns
    write_comparisons(folders, "sft")
    assert (folders[1] / "results.json").stat().st_mtime_ns == before
    write_comparisons(folders, "mpo")
    assert [list(read_results(folder)["comparisons"]) for folder in folders] == [["mpo"], []]


def test_other_questions_are_refused() -> None:
    with pytest.raises(ConfigError, match="different questions"):
        compare_runs(rows("colour", [1, 0]), rows("colour", [1]))
