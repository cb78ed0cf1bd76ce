"""The report: figures, hostile text, nothing from outside, failures first."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from minivlm.config import Config, ConfigError
from minivlm.evaluation.board import leader_board, metric_rows, task_rows
from minivlm.evaluation.curves import make_chart, read_metrics
from minivlm.evaluation.report import choose_samples, write_report
from minivlm.evaluation.results import read_results, read_rows
from minivlm.evaluation.summary import summarize
from minivlm.storage import write_bytes
from minivlm.workflow.tables import results_table
from tests.evaluations import save_evaluation, scored

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/a.png>\"'}}{{7*7}}"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(storage_path=tmp_path)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def test_hostile_text_is_escaped(config: Config, picture: Path, tmp_path: Path) -> None:
    rows = [scored(0, "colour", HOSTILE, "red", picture), scored(1, "colour", "red", "red", picture)]
    folder = save_evaluation(tmp_path / "sft", "sft", rows)
    page = write_report(config, [folder], tmp_path / "report.html").read_text()
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in page
    assert page.count("<script>") == 1
    assert "{{7*7}}" in page
    assert re.findall(r"<[^>]*(?:src|href|action)=(?!.data:)[^>]*>", page) == []
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 2


def test_a_clean_report_has_no_address_at_all(config: Config, picture: Path, tmp_path: Path) -> None:
    folder = save_evaluation(tmp_path / "sft", "sft", [scored(0, "colour", "red", "red", picture)])
    assert not re.search(r"https?:|//[a-z]", write_report(config, [folder], tmp_path / "r.html").read_text())


def test_only_the_test_split_is_said_to_be_unseen(config: Config, picture: Path, tmp_path: Path) -> None:
    own = scored(0, "colour", "red", "red", picture)
    public = replace(scored(1, "pope_random", "yes", "yes", picture), source="pope")
    for name, rows, is_said in (("own", [own], False), ("both", [own, public], True)):
        folder = save_evaluation(tmp_path / name, name, rows)
        page = write_report(config, [folder], tmp_path / f"{name}.html").read_text()
        assert ("for the public benchmarks (pope_random) was not checked" in page) is is_said
        assert "Those of the test split are about pictures that neither training nor model selection has seen" in page


def test_answers_of_all_stages_stand_side_by_side(config: Config, picture: Path, tmp_path: Path) -> None:
    stage = tmp_path / "run" / "checkpoints" / "step=1"
    first, last = (
        scored(0, "colour", "green one", "red", picture),
        scored(0, "colour", "red indeed", "red indeed", picture),
    )
    folders = [
        save_evaluation(tmp_path / "sft", "sft", [first], checkpoint=stage),
        save_evaluation(tmp_path / "mpo", "mpo", [last]),
    ]
    metrics = '{"step": 1, "train/loss": 4.0}\n{"step": 2, "train/loss": 2.0, "val/loss": 3.0}\n{"step": 3, "tra'
    write_bytes(tmp_path / "run" / "metrics.jsonl", metrics.encode())
    page = write_report(config, folders, tmp_path / "r.html").read_text()
    assert page.index("green one") < page.index("red indeed", page.index("green one"))
    assert "sft: loss" in page
    assert "mpo: loss" not in page


def test_the_leader_board_is_ordered_and_compares_with_the_first(picture: Path, tmp_path: Path) -> None:
    right, wrong = scored(0, "colour", "red", "red", picture), scored(0, "colour", "blue", "red", picture)
    other, caption = scored(1, "colour", "blue", "red", picture), scored(2, "caption", "a b", "a b", picture)
    folders = [
        save_evaluation(tmp_path / name, name, rows)
        for name, rows in {"sft": [wrong, other, caption], "mpo": [right, other, caption]}.items()
    ]
    results, rows = [read_results(folder) for folder in folders], [read_rows(folder) for folder in folders]
    best, last = leader_board(results, rows)
    assert (best["place"], best["result"]["macro"], best["difference"].difference) == (1, 0.5, 0.5)
    assert (last["place"], last["difference"]) == (0, None)
    colour, captions = task_rows(results)
    assert [bar["mean"] for bar in colour["bars"]] == [0.0, 0.5]
    assert (captions["name"], captions["measure"], captions["bars"][0]["mean"]) == ("caption", "token_accuracy", 1.0)


def test_metrics_of_tasks_stand_in_one_row_each(picture: Path, tmp_path: Path) -> None:
    folder = save_evaluation(tmp_path / "a", "a", [scored(0, "there", "yes", "yes", picture)])
    found = metric_rows(task_rows([read_results(folder)]))
    assert {"task": "there", "metric": "yes_ratio", "given": [1.0]} in found


def test_what_was_looked_at_is_shown_beside_the_checkpoint_that_looked(
    config: Config, picture: Path, tmp_path: Path
) -> None:
    rows = [scored(0, "colour", "red", "red", picture)]
    seen = {0: {"overlays": ["data:image/png;base64,QUJD"], "share": 0.25}}
    folders = [
        save_evaluation(tmp_path / "sft", "sft", rows),
        save_evaluation(tmp_path / "mpo", "mpo", rows, attention=seen),
    ]
    page = write_report(config, folders, tmp_path / "r.html").read_text()
    cells = page[page.index('id="looked"') :]
    assert cells.index("not computed") < cells.index("data:image/png;base64,QUJD") < cells.index("25.0 % of attention")
    assert 'id="looked"' not in write_report(config, folders[:1], tmp_path / "r.html").read_text()


def test_a_picture_that_is_gone_is_said_to_be(config: Config, tmp_path: Path) -> None:
    folder = save_evaluation(tmp_path / "sft", "sft", [scored(0, "colour", "red", "red", tmp_path / "gone.png")])
    assert "picture gone" in write_report(config, [folder], tmp_path / "r.html").read_text()


def test_stages_with_other_questions_are_refused(config: Config, picture: Path, tmp_path: Path) -> None:
    rows = [scored(0, "colour", "red", "red", picture)]
    folders = [
        save_evaluation(tmp_path / "sft", "sft", rows),
        save_evaluation(tmp_path / "mpo", "mpo", rows, questions="other"),
    ]
    with pytest.raises(ConfigError, match="different questions"):
        write_report(config, folders, tmp_path / "r.html")


def test_missing_evaluation_names_the_command(config: Config, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m jobs\.evaluate"):
        write_report(config, [tmp_path], tmp_path / "r.html")


def test_summary_hand_values(picture: Path) -> None:
    rows = [
        scored(0, "colour", "red", "red", picture),
        scored(1, "colour", "", "red", picture, shuffled="red"),
        scored(2, "count", "2", "two", picture, shuffled=None),
        scored(3, "caption", "a b", "a b", picture),
    ]
    summary = summarize(rows, {"shuffled": {"count": {"no other picture to show": 1}}})
    assert summary["macro"] == 0.75
    assert summary["shuffled_macro"] == 0.5
    colour, count = summary["tasks"]["colour"], summary["tasks"]["count"]
    assert (colour["n"], colour["accuracy"], colour["num_empty"]) == (2, 0.5, 1)
    # Scores 1 and 0 about two pictures: 2 / 1 * 2 * (.5 / 2)^2 = .25 = .5^2; 2.801585 * sqrt(2) * .5.
    assert (colour["error"], colour["minimum_difference"]) == pytest.approx((0.5, 1.981020), abs=1e-6)
    shuffled = colour["variants"]["shuffled"]
    assert (shuffled["accuracy"], shuffled["n"], shuffled["low"] < 0.5 < shuffled["high"]) == (0.5, 2, True)
    assert (count["accuracy"], count["variants"], count["minimum_difference"]) == (1.0, {}, None)
    assert summary["variants"] == {
        "shuffled": {"macro": 0.5, "n": 3, "skipped": {"count": {"no other picture to show": 1}}}
    }
    assert summary["caption"]["token_accuracy"] == 1.0
    assert summary["caption"]["variants"]["shuffled"]["accuracy"] == 0.5
    assert summary["languages"]["en"]["n"] == 3


def test_only_captions_have_no_macro(picture: Path) -> None:
    summary = summarize([scored(0, "caption", "a b", "a b", picture)], {})
    assert (summary["macro"], summary["shuffled_macro"], summary["tasks"]) == (None, None, {})


def test_failures_come_first_and_leave_room_for_successes() -> None:
    rows = [{"task": "colour", "score": float(i % 2)} for i in range(40)] + [{"task": "count", "score": 1.0}] * 2
    shown = choose_samples(rows, 6)
    assert [rows[i]["score"] for i in shown] == [0.0] * 4 + [1.0] * 4
    assert sum(rows[i]["task"] == "count" for i in shown) == 2
    assert choose_samples([{"task": "a", "score": 0.0}] * 9, 6) == [0, 1, 3, 4, 6, 7]


def test_chart_scales_to_the_plot_area() -> None:
    chart = make_chart("loss", [(1, 4.0), (2, 3.0), (3, 2.0)], [(3, 3.0)])
    assert chart.line == "M0.0 0.0 L160.0 65.0 L320.0 130.0"
    assert chart.dots == [(320.0, 65.0)]
    assert (chart.low, chart.high, chart.last_step, chart.last_value) == ("2", "4", 3, "3")


def test_metrics_skip_torn_and_non_finite_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": NaN}\n[1]\n{"step": 3, "tr')
    assert read_metrics(path) == {"train/loss": [(1.0, 2.0)]}
    assert read_metrics(tmp_path / "none.jsonl") == {}


def test_the_macro_line_counts_the_questions_behind_it(tmp_path, picture):
    """Two captions and three questions: five in all, three in the mean."""
    rows = [scored(n, "caption", "a b", "a b", picture) for n in range(2)]
    rows += [scored(n, "colour", "red", "red", picture) for n in range(2, 5)]
    results = read_results(save_evaluation(tmp_path / "sft", "sft", rows)) | {"comparisons": {}}
    table = results_table([results])
    [macro] = [line.split() for line in table.splitlines() if line.startswith("macro")]
    assert macro[:3] == ["macro", "3", "100.0"]
