"""Evaluation and preference sampling on a real Ray cluster; the tiny model answers `red` or `blue` at random."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from minivlm.config import Config
from minivlm.data.collate import collate
from minivlm.data.pipeline import prepare_features
from minivlm.data.tokens import TokenTable
from minivlm.evaluation.results import read_attention, read_results, read_rows
from minivlm.evaluation.runner import evaluate, evaluate_exports
from minivlm.inference.exports import folder_export, stage_export
from minivlm.layout import pairs_dir
from minivlm.model.export import load_export
from minivlm.model.vlm import sequence_logps
from minivlm.preferences.files import read_pairs
from minivlm.preferences.reference import add_reference_logps
from minivlm.preferences.sampling import build_pairs
from minivlm.storage import write_json
from minivlm.tracking.registry import find_evaluation
from minivlm.tracking.runs import start_run
from minivlm.workflow.register import Candidate, submit
from tests.toy_run import NUM_CAPTIONS, NUM_PICTURES, make_toy_run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=128 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def toy(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_toy_run(tmp_path_factory.mktemp("toy"))


def test_evaluation_scores_every_question_in_both_variants(toy: Config) -> None:
    folder = evaluate(toy, "sft")
    results = read_results(folder)
    colour = results["tasks"]["colour"]
    asked = (colour["n"], colour["variants"]["shuffled"]["n"], results["caption"]["n"])
    assert asked == (NUM_PICTURES, NUM_PICTURES, NUM_PICTURES)
    rows = read_rows(folder)
    assert {row["answer"] for row in rows if row["task"] == "colour"} <= {"red", "blue"}
    assert colour["accuracy"] == sum(row["answer"] == row["truth"] for row in rows if row["task"] == "colour") / 24
    assert all(row["images"] != row["wrong_images"] for row in rows)
    seen = read_attention(folder)
    assert {rows[number]["task"] for number in seen} == {"colour", "pope"}
    assert all(0 < own["share"] < 1 and len(own["overlays"]) == 1 for own in seen.values())
    assert len(list((folder / "lmms_eval" / "sft").glob("*_results.json"))) == 1


def test_benchmarks_are_asked_beside_the_test_split_and_what_cannot_be_asked_is_counted(toy: Config) -> None:
    folder = evaluate(toy, "sft")
    results = read_results(folder)
    asked = [row for row in read_rows(folder) if row["task"] == "pope"]
    assert [row["question_id"] for row in asked] == ["pope/0", "pope/1"]
    assert all(row["answer"] and row["variants"]["shuffled"]["answer"] for row in asked)
    pope = results["tasks"]["pope"]
    assert (pope["n"], pope["accuracy"], pope["metrics"]["unclear"], pope["metrics"]["yes_ratio"]) == (2, 0, 1, 0)
    account = results["benchmarks"]["pope"]
    assert (account["rows"], account["asked"], account["bad"], account["reasons"]) == (3, 2, 1, {"image": 1})


def test_a_finished_evaluation_is_not_run_again(toy: Config) -> None:
    path = evaluate(toy, "sft") / "results.json"
    before = path.stat().st_mtime_ns
    evaluate(toy, "sft")
    assert path.stat().st_mtime_ns == before


def test_exports_stand_side_by_side_and_a_killed_evaluation_goes_on(toy: Config, tmp_path: Path) -> None:
    """The stage and a copy of its export, in other batches than before; two batches of the copy are lost."""
    first = evaluate(toy, "sft")
    copy = shutil.copytree(stage_export(toy, "sft").export_dir, tmp_path / "copy")
    asked = ("shuffled", "no_image", "cot", "jpeg", "occlude", "few_shot")
    other = _with(toy, batch_size=5, heat_maps=0, variants=asked, num_shots=1)
    exports = [stage_export(other, "sft"), folder_export("a copy", copy)]
    folders = evaluate_exports(other, exports)
    assert len({first, *folders}) == 3
    ours, copied = read_rows(folders[0]), read_rows(folders[1])
    assert ours == copied
    for row, before in zip(ours, read_rows(first), strict=True):
        kept = {name: variant for name, variant in row["variants"].items() if name == "shuffled"}
        assert row | {"variants": kept} == before
    results = read_results(folders[1])
    counts = {name: figures["n"] for name, figures in results["variants"].items()}
    asked_of = {"cot": NUM_PICTURES + 2, "few_shot": 2 * NUM_PICTURES}  # no captions; nothing to learn pope from
    assert counts == {name: asked_of.get(name, 2 * NUM_PICTURES + 2) for name in asked}
    against = results["comparisons"]["sft"]["macro"]
    assert (against["difference"], against["p_value"], against["n"]) == (0.0, 1.0, NUM_PICTURES + 2)
    assert (results["name"], results["stage"], results["macro"]) == ("a copy", None, read_results(first)["macro"])
    assert results["variants"]["cot"]["skipped"] == {"caption": {"a caption has no final answer": NUM_PICTURES}}
    chunks = sorted((folders[1] / "answers").iterdir())
    for path in (chunks[1], chunks[3], folders[1] / "results.json", folders[1] / "samples.jsonl"):
        path.unlink()
    untouched = chunks[0].stat().st_mtime_ns
    assert evaluate_exports(other, exports) == folders
    assert read_rows(folders[1]) == copied
    assert chunks[0].stat().st_mtime_ns == untouched


def test_a_champion_that_was_not_asked_the_questions_is_asked_before_it_is_compared(
    toy: Config, tmp_path: Path
) -> None:
    other = _with(toy, max_new_tokens=7)
    export = stage_export(toy, "sft")
    copy = shutil.copytree(export.export_dir, tmp_path / "copy")
    (copy / "notes.txt").write_text("another version with the same weights")
    entries = [(toy, export), (other, folder_export("copy", copy))]
    with start_run(toy, "register") as run:
        found = [
            submit(config, Candidate(entry.export_dir, evaluate_exports(config, [entry])[0], "# card"), run)
            for config, entry in entries
        ]
    assert [(result.promoted, result.champion) for result in found] == [(True, 1), (False, 1)]
    assert "refused by gate `better`: +0.00 points on champion 1" in found[1].reason
    [asked] = (toy.root / "evaluations").glob("champion-1-*")
    questions = read_results(asked)["questions"]
    assert find_evaluation(toy, 1, questions, tmp_path / "kept")
    assert read_rows(tmp_path / "kept") == read_rows(asked)


def _with(config: Config, **settings: Any) -> Config:
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=settings)})


def test_missing_run_names_the_command(toy: Config) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m jobs\.train mpo"):
        evaluate(toy, "mpo")


def test_pairs_are_right_against_wrong_and_do_not_depend_on_batches_or_on_a_kill(toy: Config) -> None:
    folder = build_pairs(toy)
    pairs = read_pairs(folder / "pairs.parquet")
    lines = (folder / "minivlm_correctness_rules.jsonl").read_text().splitlines()
    truths = {row["id"]: row for row in map(json.loads, lines)}
    for pair in pairs:
        assert pair.chosen == pair.answer == truths[pair.pair_id]["answer_gt"]
        assert pair.rejected != pair.answer
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_samples"] == NUM_PICTURES * 6
    assert 0.2 < summary["accuracy"] < 0.8

    changes = {"batch_size": 20, "policy": stage_export(toy, "sft").export_dir, "dropout_ntp_tasks": ("caption",)}
    other = toy.model_copy(update={"preferences": toy.preferences.model_copy(update=changes)})
    again = build_pairs(other)
    assert again != folder
    assert [pair for pair in read_pairs(again / "pairs.parquet") if pair.kind != "dropout_ntp"] == pairs
    _check_open_pairs(again)

    chunks = sorted((folder / "answers").iterdir())
    assert len(chunks) == 5
    for path in (chunks[1], chunks[3], folder / "summary.json", folder / "pairs.parquet"):
        path.unlink()
    untouched = chunks[0].stat().st_mtime_ns
    build_pairs(toy)
    assert read_pairs(folder / "pairs.parquet") == pairs
    assert chunks[0].stat().st_mtime_ns == untouched


def _check_open_pairs(folder: Path) -> None:
    """Every training caption became a pair, or is counted under the reason why not."""
    pairs = [pair for pair in read_pairs(folder / "pairs.parquet") if pair.kind == "dropout_ntp"]
    summary = json.loads((folder / "summary.json").read_text())
    dropped = {reason: n for reason, n in summary["drops"].items() if reason.startswith(("open", "continuation"))}
    assert len(pairs) + sum(dropped.values()) == summary["num_open_questions"] == NUM_CAPTIONS
    for pair in pairs:
        assert pair.question == "<image>\nDescribe it."
        assert pair.chosen != pair.rejected
        assert pair.chosen[0] == pair.rejected[0]


def test_reference_values_equal_a_plain_forward(toy: Config) -> None:
    build_pairs(toy)
    table = TokenTable.open(add_reference_logps(toy))
    assert table.group_size == 2
    export = load_export(stage_export(toy, "sft").export_dir)
    cache = prepare_features(toy, str(toy.clip.path))
    entries = list(range(min(6, len(table))))
    with torch.inference_mode():
        for entry in entries:
            batch = collate(table, [(entry,)], cache.get, image_token_id=export.image_token_id, pad_token_id=0)
            expected = sequence_logps(export.vlm(batch), 1)
            torch.testing.assert_close(batch["reference_logps"], expected, atol=1e-4, rtol=0)
    pairs = read_pairs(pairs_dir(toy) / "pairs.parquet")
    assert [pair.ref_chosen_logps for pair in pairs] == pytest.approx(table.reference_logps[::2].tolist())
    assert {pair.reference for pair in pairs} == {stage_export(toy, "sft").reference}


def test_stale_reference_values_are_refused(toy: Config) -> None:
    build_pairs(toy)
    add_reference_logps(toy)
    path = pairs_dir(toy) / "reference.json"
    stored = json.loads(path.read_text())
    write_json(path, stored | {"reference": "0" * 16})
    with pytest.raises(ValueError, match="wrong reference"):
        add_reference_logps(toy)
    write_json(path, stored)
