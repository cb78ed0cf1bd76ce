"""Public benchmarks in their own formats: what is asked, what is true, and what is set aside with its reason."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlm.config import Config, ConfigError, load_config
from minivlm.config.benchmarks import KINDS, BenchmarkConfig
from minivlm.data.errors import DataError, RowError
from minivlm.data.images import ImageLimits
from minivlm.evaluation.benchmarks.load import Loaded, count_rows, load_benchmark, load_benchmarks
from minivlm.evaluation.benchmarks.rows import NUMBER, READ, Row, check_row
from minivlm.evaluation.tasks import Question
from minivlm.scoring.scorers import SCORERS, Attempt
from minivlm.workflow.dry_run import describe
from tests import benchmark_files as files

LIMITS = ImageLimits(max_bytes=100_000, max_pixels=10_000, max_side=200, max_aspect=20)
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def load(kind: str, tmp_path: Path, *, max_questions: int | None = None, **fields: Any) -> Loaded:
    benchmark = BenchmarkConfig(kind=kind, **fields)
    return load_benchmark(
        benchmark,
        limits=LIMITS,
        pictures_dir=tmp_path / "kept",
        max_questions=max_questions,
        seed=0,
        count_tokens=lambda messages: len(messages[0].content),
        max_tokens=1000,
    )


def build(name: str, tmp_path: Path) -> Loaded:
    kind, builder = files.BUILDERS[name]
    return load(kind, tmp_path, **builder(tmp_path))


def right_score(question: Question, answer: str) -> float:
    attempt = Attempt(answer, question.accepted, question.choices, question.group)
    return SCORERS[question.scorer].judge(attempt).score


@pytest.mark.parametrize(
    ("name", "text", "truths", "scorer", "group", "right", "wrong"),
    [
        ("vqav2", f"How many dogs?\n{SHORT}", ("2",) * 8 + ("two dogs",) * 2, "vqa", "", "Two", "3"),
        ("textvqa", f"what is the brand?\n{SHORT}", ("nokia",) * 9 + ("toshiba",), "vqa", "", "Nokia", "lg"),
        (
            "scienceqa",
            f"Context: Look at the picture.\nWhich is the largest?\nA. cat\nB. whale\n{LETTER}",
            ("A",), "choice", "natural science", "A.", "B.",
        ),
        ("chartqa", f"What share?\n{SHORT}", ("25%",), "relaxed", "", "0.26", "25"),
        ("chartqa_parquet", f"What share?\n{SHORT}", ("25%",), "relaxed", "human_test", "25%", "40%"),
        ("docvqa", f"What is the value?\n{SHORT}", ("0.28", ".28"), "anls", "", "0.28", "seven"),
        ("infovqa", f"Which app?\n{SHORT}", ("instagram",), "anls", "", "Instagram", "x"),
        ("ocrbench", "what is written in the image?", ("CENTRE",), "contains", "Regular Text Recognition",
         "It says centre.", "center"),
        ("pope", f"Is there a snowboard in the image?\n{SHORT}", ("yes",), "pope", "", "Yes", "no"),
        ("pope_parquet", f"Is there a dog in the image?\n{SHORT}", ("no",), "pope", "adversarial", "no", "yes"),
        ("mme", "Is it blue? Please answer yes or no.", ("yes",), "mme", "color/000000006723.jpg", "Yes.", "No"),
        (
            "mmstar",
            f"What is shown?\nOptions: A: a cat, B: a dog, C: two birds, D: nothing\n{LETTER}",
            ("B",), "choice", "biology & chemistry", "a dog", "A",
        ),
        ("mmmu", f"<image 1> Which of <image 2>?\nA. $6\nB. $7\n{LETTER}", ("A",), "choice", "Accounting", "(A)", "B"),
        ("table", f"What is\nit?\nA. cat\nB. dog\nC. bird\n{LETTER}", ("C",), "choice", "recognition", "C", "D"),
        ("mathvista", f"How long? (Unit: cm)\n{SHORT}", ("1.2",), "math", "geometry problem solving", "1.20", "1.3"),
        ("coco_captions", "Provide a one-sentence caption for the provided image.", ("A man a.", "A man b."),
         "captions", "", "A man b.", "Zebra"),
    ],
)  # fmt: skip
def test_the_first_question_of_each_benchmark(
    name: str, text: str, truths: tuple[str, ...], scorer: str, group: str, right: str, wrong: str, tmp_path: Path
) -> None:
    loaded = build(name, tmp_path)
    question = loaded.questions[0]
    content = question.messages[0].content
    assert content == "<image>\n" * len(question.images) + text
    assert len(question.images) == len(question.image_sha256) == (2 if name == "mmmu" else 1)
    assert (question.truths, question.scorer, question.group) == (truths, scorer, group)
    assert (question.task, question.source) == (files.BUILDERS[name][0],) * 2
    assert (right_score(question, right), right_score(question, wrong)) == (1.0, 0.0)
    assert loaded.bad == []
    assert all(Path(path).is_file() for path in question.images)


def test_every_kind_is_read_and_has_a_fixture() -> None:
    assert set(READ) == set(KINDS) == {kind for kind, _ in files.BUILDERS.values()}


def test_the_split_is_test_unless_named(tmp_path: Path) -> None:
    fields = files.scienceqa(tmp_path)
    assert [q.question_id for q in load("scienceqa", tmp_path, **fields).questions] == ["scienceqa/4", "scienceqa/5"]
    assert load("scienceqa", tmp_path, split="train", **fields).rows == 1
    assert load("scienceqa", tmp_path, **fields).questions[1].images == ()  # asked without a picture


def test_open_questions_formulas_and_choices_have_scorers_of_their_own(tmp_path: Path) -> None:
    second = build("mmmu", tmp_path).questions[1]
    assert (second.scorer, second.truths, second.group) == ("short_answer", ("4", "four"), "Art_Theory")
    assert build("ocrbench", tmp_path).questions[1].scorer == "contains_formula"
    choice = build("mathvista", tmp_path).questions[1]
    assert (choice.choices, right_score(choice, "B"), right_score(choice, "145")) == (("35°", "145°"), 1.0, 0.0)


def test_mme_keeps_pairs_together_when_questions_are_limited(tmp_path: Path) -> None:
    loaded = load("mme", tmp_path, max_questions=3, **files.mme(tmp_path))
    assert len(loaded.questions) == 2
    assert len({question.group for question in loaded.questions}) == 1


def lines(tmp_path: Path, rows: list[Any]) -> dict[str, Any]:
    fields = files.pope(tmp_path)
    fields["path"].write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return fields


GOOD = {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a car?", "label": "no"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (GOOD | {"question_id": 2, "image": "gone.jpg"}, "no file 'gone.jpg'"),
        (GOOD | {"question_id": 2, "image": "../secret.jpg"}, "leaves the image root"),
        (GOOD | {"question_id": 2, "image": "/etc/passwd"}, "not relative"),
        (GOOD, "id '1' stands twice, first in row 1"),
        (GOOD | {"question_id": 2, "label": "maybe"}, "'maybe' is not yes or no"),
        ({"question_id": 2, "image": GOOD["image"], "label": "no"}, "no `text` or `question`"),
        (GOOD | {"question_id": 2, "text": " "}, "an empty question"),
        (GOOD | {"question_id": 2, "text": "see <image> here"}, "which marks a picture's place"),
        (GOOD | {"question_id": 2, "text": "x" * 30_000}, "a text of 3"),
        (GOOD | {"question_id": 2, "text": "x" * 990}, "a prompt of 1049 tokens, more than"),
        (GOOD | {"question_id": 2, "text": "\ud800"}, "surrogate"),
        (GOOD | {"question_id": [1]}, "`question_id` must be text"),
        ("{not json", "not JSON"),
        ("[1]", "must be an object"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_asked_is_named_and_the_others_are_asked(bad: Any, reason: str, tmp_path: Path) -> None:
    loaded = load("pope", tmp_path, **lines(tmp_path, [GOOD, bad]))
    assert [question.question_id for question in loaded.questions] == ["pope/1"]
    assert [(row.row, row.file) for row in loaded.bad] == [(2, str(tmp_path / "coco_pope_random.json"))]
    assert reason in loaded.bad[0].reason
    # of two rows one cannot be read; a picture is opened last, and then it is one of two chosen rows: the same share
    assert (loaded.rows, loaded.bad_share) == (2, 0.5)


def test_a_picture_that_is_no_picture_is_set_aside(tmp_path: Path) -> None:
    fields = lines(tmp_path, [GOOD, GOOD | {"question_id": 2, "image": "broken.jpg"}])
    (fields["images"] / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    loaded = load("pope", tmp_path, **fields)
    assert "not a readable picture" in loaded.bad[0].reason
    assert (len(loaded.questions), loaded.bad_share) == (1, 0.5)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", "{not json", "not JSON"),
        ("a.json", "[" * 100_000, "not JSON|nested too deeply"),
        ("a.json", '{"data": {"a": 1}, "b": 2}', "neither a list nor a list under `data`"),
        ("a.parquet", "no", "not a parquet file"),
        ("a.xml", "<a/>", "ends in .json"),
        ("gone.json", None, "No benchmark file"),
    ],
)
def test_a_broken_file_is_one_error(name: str, content: str | None, complaint: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=complaint):
        load("docvqa", tmp_path, path=tmp_path / name)


def test_vqav2_needs_its_annotations(tmp_path: Path) -> None:
    fields = files.vqav2(tmp_path)
    tree = json.loads(fields["annotations"].read_text())
    tree["annotations"][0]["question_id"] = 7
    fields["annotations"].write_text(json.dumps(tree))
    assert "question '42000' has no annotation" in load("vqav2", tmp_path, **fields).bad[0].reason


def test_a_question_with_two_annotations_is_set_aside_and_the_others_are_asked(tmp_path: Path) -> None:
    fields = files.vqav2(tmp_path)
    asked, found = (json.loads(fields[key].read_text()) for key in ("path", "annotations"))
    asked["questions"].append(asked["questions"][0] | {"question_id": 7})
    found["annotations"] += [found["annotations"][0] | {"question_id": 7}] * 2 + ["no object"]
    for key, tree in (("path", asked), ("annotations", found)):
        fields[key].write_text(json.dumps(tree))
    loaded = load("vqav2", tmp_path, **fields)
    assert [question.question_id for question in loaded.questions] == ["vqav2/42000"]
    assert [(bad.row, bad.reason) for bad in loaded.bad] == [
        (2, "several annotations in v2_mscoco_val2014_annotations.json for question '7'")
    ]


def test_one_question_of_several_charts_is_several_questions(tmp_path: Path) -> None:
    loaded = build("chartqa_parquet", tmp_path)
    assert [question.question_id for question in loaded.questions] == [
        "chartqa/row 1: What share?", "chartqa/row 2: What share?",
    ]  # fmt: skip


def test_mme_without_a_picture_or_an_answer_goes_on(tmp_path: Path) -> None:
    fields = files.mme(tmp_path)
    (tmp_path / "color" / "000000006723.jpg").unlink()
    (tmp_path / "posters" / "questions_answers_YN" / "x.txt").write_text("no tab here\n")
    loaded = load("mme", tmp_path, **fields)
    assert [row.reason.split(":")[0] for row in loaded.bad] == [
        "color/000000006723.txt", "color/000000006723.txt", "posters/questions_answers_YN/x.txt",
    ]  # fmt: skip
    assert len(loaded.questions) == 2


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from(
    ["question", "question_id", "answers", "answer", "image", "text", "label", "id", "choices", "options", "category",
     "sentences", "filename", "type", "dataset_name", "A", "B", "index", "hint", "metadata", "question_type", "pid"]
)  # fmt: skip


@settings(max_examples=60)
@given(st.sampled_from(KINDS), st.dictionaries(KEYS, VALUES, max_size=8))
def test_any_row_is_a_question_or_has_a_reason(kind: str, raw: dict[str, Any]) -> None:
    with suppress(RowError):
        row = check_row(READ[kind](raw | {NUMBER: 1}))
        assert isinstance(row, Row)
        SCORERS[row.scorer].unfit(row.truths, row.choices)


def config_with(tmp_path: Path, *benchmarks: dict[str, Any], max_bad: float = 0.01) -> Config:
    evaluation = {"benchmarks": list(benchmarks), "max_bad_fraction": max_bad}
    return Config.model_validate({"storage_path": str(tmp_path / "store"), "evaluation": evaluation})


def load_all(config: Config, taken: tuple[str, ...] = ()) -> tuple[list[Question], dict[str, dict[str, Any]]]:
    return load_benchmarks(config, taken=taken, count_tokens=len)


def test_too_many_bad_rows_stop_the_run_and_are_listed(tmp_path: Path) -> None:
    fields = lines(tmp_path, [GOOD, GOOD])
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be asked.*row 2.*twice.*evaluation.max_bad_fraction=0.51"):
        load_all(config_with(tmp_path, {"kind": "pope", **fields}))
    listed = (tmp_path / "store" / "benchmarks" / "pope.quarantine.jsonl").read_text()
    assert json.loads(listed)["row"] == 2
    questions, account = load_all(config_with(tmp_path, {"kind": "pope", **fields}, max_bad=0.6))
    assert account["pope"] | {"file": ""} == {
        "file": "", "rows": 2, "asked": 1, "bad": 1, "reasons": {"id": 1},
    }  # fmt: skip
    assert len(questions) == 1


def test_two_files_of_one_kind_need_names(tmp_path: Path) -> None:
    pope = {"kind": "pope", **files.pope(tmp_path)}
    with pytest.raises(DataError, match="two tasks are called `pope`: add `name`"):
        load_all(config_with(tmp_path, pope, pope))
    questions, account = load_all(config_with(tmp_path, pope, pope | {"name": "pope_again"}))
    assert list(account) == ["pope", "pope_again"]
    assert len({question.question_id for question in questions}) == 4
    with pytest.raises(DataError, match="two tasks"):
        load_all(config_with(tmp_path, pope | {"name": "colour"}), taken=("colour",))


def test_settings_name_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for text, complaint in (
        ("{kind: popes, path: a.json}", "Did you mean `pope`"),
        ("{kind: vqav2, path: a.json}", "needs `annotations`"),
        ("{kind: pope, path: a.json, annotations: b.json}", "remove `annotations`"),
    ):
        path.write_text(f"evaluation: {{benchmarks: [{text}]}}")
        with pytest.raises(ConfigError, match=complaint):
            load_config(path)


def test_a_dry_run_counts_the_rows(tmp_path: Path, tiny_config: Path) -> None:
    fields = lines(tmp_path, [GOOD, GOOD | {"question_id": 2, "label": "maybe"}])
    assert count_rows(BenchmarkConfig(kind="pope", **fields)) == (2, 1)
    given = [f"storage_path={tmp_path}", f"evaluation.benchmarks=[{{kind: pope, path: {fields['path']}}}]"]
    assert "2 rows, 1 of them cannot be asked, read as pope" in describe(load_config(tiny_config, given))
