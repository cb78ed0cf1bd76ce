"""The report: figures, hostile text, nothing from outside, failures first."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from minivlm.config import Config, ConfigError
from minivlm.evaluation.curves import make_chart, read_metrics
from minivlm.evaluation.report import choose_samples, write_report
from minivlm.evaluation.summary import Reply, ScoredRow, score_question, summarize, to_json
from minivlm.evaluation.tasks import Question
from minivlm.layout import evaluation_dir, run_dir
from minivlm.schema import Message
from minivlm.storage import write_bytes, write_json

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/a.png>\"'}}{{7*7}}"


def scored(
    number: int, task: str, answer: str, truth: str, picture: Path, *, shuffled: str | None = "blue"
) -> ScoredRow:
    messages = (Message("user", "<image>\nWhich colour?"),)
    images, digests = (str(picture),), (f"{number:064}",)
    scorer = "caption_tokens" if task == "caption" else "short_answer"
    question = Question(f"q{number}", task, "en", images, digests, messages, truth, truth, scorer)
    others = {"shuffled": Reply(shuffled, (1,))} if shuffled is not None else {}
    return score_question(question, Reply(answer, (1, 2)), others, encode=lambda text: [1, 2], max_new_tokens=8)


def save_evaluation(config: Config, stage: str, rows: list[ScoredRow], questions: str = "same") -> Path:
    folder = evaluation_dir(config, stage, "ab12")
    write_bytes(folder / "samples.jsonl", "".join(json.dumps(to_json(row)) + "\n" for row in rows).encode())
    checkpoint = str(run_dir(config, stage) / "checkpoints" / "step=1")
    head = {
        "name": stage,
        "stage": stage,
        "checkpoint": checkpoint,
        "reference": "ab12",
        "questions": questions,
        "num_questions": len(rows),
    }
    write_json(folder / "results.json", head | summarize(rows, {"shuffled": {}}))
    return folder


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
    folder = save_evaluation(config, "sft", rows)
    page = write_report(config, [folder], tmp_path / "report.html").read_text()
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in page
    assert page.count("<script>") == 1
    assert "{{7*7}}" in page
    assert re.findall(r"<[^>]*(?:src|href|action)=(?!.data:)[^>]*>", page) == []
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 2


def test_a_clean_report_has_no_address_at_all(config: Config, picture: Path, tmp_path: Path) -> None:
    folder = save_evaluation(config, "sft", [scored(0, "colour", "red", "red", picture)])
    assert not re.search(r"https?:|//[a-z]", write_report(config, [folder], tmp_path / "r.html").read_text())


def test_answers_of_all_stages_stand_side_by_side(config: Config, picture: Path, tmp_path: Path) -> None:
    folders = [
        save_evaluation(config, "sft", [scored(0, "colour", "green one", "red", picture)]),
        save_evaluation(config, "mpo", [scored(0, "colour", "red indeed", "red indeed", picture)]),
    ]
    metrics = '{"step": 1, "train/loss": 4.0}\n{"step": 2, "train/loss": 2.0, "val/loss": 3.0}\n{"step": 3, "tra'
    write_bytes(run_dir(config, "sft") / "metrics.jsonl", metrics.encode())
    page = write_report(config, folders, tmp_path / "r.html").read_text()
    assert page.index("green one") < page.index("red indeed", page.index("green one"))
    assert "sft: loss" in page
    assert "mpo: loss" not in page


def test_a_picture_that_is_gone_is_said_to_be(config: Config, tmp_path: Path) -> None:
    folder = save_evaluation(config, "sft", [scored(0, "colour", "red", "red", tmp_path / "gone.png")])
    assert "picture gone" in write_report(config, [folder], tmp_path / "r.html").read_text()


def test_stages_with_other_questions_are_refused(config: Config, picture: Path, tmp_path: Path) -> None:
    rows = [scored(0, "colour", "red", "red", picture)]
    folders = [save_evaluation(config, "sft", rows), save_evaluation(config, "mpo", rows, questions="other")]
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
