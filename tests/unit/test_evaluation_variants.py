"""In which ways a question is asked, and which ways do not suit it."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minivlm.config import ConfigError
from minivlm.evaluation.robustness import transform
from minivlm.evaluation.shots import POOL, check_context, example_pools
from minivlm.evaluation.tasks import Question
from minivlm.evaluation.variants import ROBUSTNESS, Asked, Material, ask_all, asks_for_steps, vary
from minivlm.inference.exports import folder_export
from minivlm.schema import Message, Sample
from minivlm.scoring.scorers import CAPTION_TOKENS, SHORT_ANSWER
from tests.tiny_export import CONTEXT, build_export

NONE = Material()
STEPS = "Think step by step and end with 'Final answer: ..'."
SHORT = "Answer the question using a single word or phrase."


def question(text: str = "<image>\nHow many?", task: str = "count", language: str = "en") -> Question:
    pictures = tuple(str(number) for number in range(text.count("<image>")))
    scorer = CAPTION_TOKENS if task == "caption" else SHORT_ANSWER
    return Question("q", task, language, pictures, pictures, (Message("user", text),), "3", "3", scorer)


def text_of(way: Asked | str) -> str:
    assert isinstance(way, Asked)
    return way.messages[-1].content


def test_without_pictures_there_is_no_placeholder() -> None:
    turns = (Message("user", "<image>\n<image>\nWhich?"), Message("assistant", "This <image>."), Message("user", "So?"))
    way = vary(replace(question("<image>\n<image>"), messages=turns), "no_image", NONE)
    assert isinstance(way, Asked)
    assert [turn.content for turn in way.messages] == ["Which?", "This <image>.", "So?"]
    assert way.image_sha256 == ()
    assert vary(question("How many?"), "no_image", NONE) == "shows no picture"


def test_direct_replaces_the_request_for_steps() -> None:
    assert text_of(vary(question(f"<image>\nHow many? {STEPS}"), "direct", NONE)) == f"<image>\nHow many?\n{SHORT}"


@pytest.mark.parametrize("text", ["<image>\nHow many?", "<image>How many?", f"<image>\nHow many?\n{SHORT}"])
def test_what_asks_for_no_steps_is_direct_already(text: str) -> None:
    assert vary(question(text), "direct", NONE) == "asks for no chain of thought"


def test_cot_wraps_in_the_questions_language() -> None:
    assert asks_for_steps(text_of(vary(question(), "cot", NONE)))
    assert text_of(vary(question(f"<image>\nHow many?\n{SHORT}"), "cot", NONE)).endswith("Question:\n\nHow many?")
    assert "请先逐步推理" in text_of(vary(question("<image>\n有几个？", language="zh"), "cot", NONE))


def test_cot_suits_neither_captions_nor_what_carries_it() -> None:
    benchmark = replace(question(task="coco_captions"), scorer="captions")
    for asked in (question(task="caption"), benchmark):
        assert vary(asked, "cot", NONE) == "a caption has no final answer"
    assert vary(question(f"<image>\nHow many? {STEPS}"), "cot", NONE) == "asks for a chain of thought already"


@pytest.mark.parametrize("variant", ["direct", "cot"])
def test_rewording_keeps_the_pictures_and_earlier_turns(variant: str) -> None:
    text = f"How many? {STEPS}" if variant == "direct" else "How many?"
    turns = (Message("user", "<image>\nWhat?"), Message("assistant", "A cat."), Message("user", text))
    way = vary(replace(question("<image>"), messages=turns), variant, NONE)
    assert isinstance(way, Asked)
    assert (way.messages[:2], way.image_sha256) == (turns[:2], ("0",))


def test_what_a_variant_leaves_out_is_counted_with_the_reason() -> None:
    asked = [question(), question(task="caption"), question(f"<image>\nHow many? {STEPS}", task="reasoning")]
    found = ask_all(asked, ["direct", "cot", "cot"], NONE)
    assert list(found.asked["real"]) == [0, 1, 2]
    assert (list(found.asked["direct"]), list(found.asked["cot"])) == ([2], [0])
    reason = "asks for no chain of thought"
    assert found.skipped["direct"] == {"caption": {reason: 1}, "count": {reason: 1}}


def test_worse_pictures_stand_in_the_places_of_the_right_ones() -> None:
    material = Material(worse={"blur": {"0": "x", "1": "y"}})
    asked = question("<image>\n<image>\nWhich?")
    assert vary(asked, "blur", material) == Asked(asked.messages, ("x", "y"))
    assert vary(question("Which?"), "blur", material) == "shows no picture"


def sample(number: int, task: str = "count", language: str = "en", picture: str = "t", turns: int = 1) -> Sample:
    pair = (Message("user", f"<image>\nHow many {number}?"), Message("assistant", str(number)))
    pictures = (f"{picture}{number}",) * turns
    return Sample(f"s{number}", pictures, pictures, pair * turns, "sft", "train", task, language)


def test_shots_are_training_examples_of_the_task_with_their_pictures() -> None:
    asked = question()
    samples = [sample(0, turns=2), sample(1, task="colour"), sample(2, language="zh"), sample(3), sample(4)]
    pools = example_pools(samples, [asked], seed=0)
    assert {s.sample_id for s in pools["count", "en"]} == {"s3", "s4"}
    way = vary(asked, "few_shot", Material(pools=pools, num_shots=2))
    assert isinstance(way, Asked)
    assert [turn.role for turn in way.messages] == ["user", "assistant"] * 2 + ["user"]
    assert sorted(way.image_sha256[:2]) == ["t3", "t4"]
    assert (way.messages[-1], way.image_sha256[2:]) == (asked.messages[0], asked.image_sha256)
    shown = [digest.removeprefix("t") for digest in way.image_sha256[:2]]
    assert [turn.content for turn in way.messages[1:4:2]] == shown
    reason = "fewer than 3 training examples of its task and language"
    assert vary(asked, "few_shot", Material(pools=pools, num_shots=3)) == reason


def test_no_shot_is_about_the_questions_own_picture() -> None:
    own = [sample(number, picture="") for number in range(1)]
    pools = example_pools([*own, sample(1), sample(2)], [question()], seed=0)
    way = vary(question(), "few_shot", Material(pools=pools, num_shots=2))
    assert isinstance(way, Asked)
    assert sorted(way.image_sha256) == ["0", "t1", "t2"]


def test_shots_depend_on_the_seed_and_the_question_only() -> None:
    samples = [sample(number) for number in range(2 * POOL)]
    pools = example_pools(samples, [question()], seed=0)
    assert pools == example_pools(samples[::-1], [question()], seed=0)
    assert len(pools["count", "en"]) == POOL
    first, other = (replace(question(), question_id=name) for name in ("a", "b"))
    ways = [vary(q, "few_shot", Material(pools=pools, num_shots=4)) for q in (first, first, other)]
    assert ways[0] == ways[1] != ways[2]


def test_shots_that_do_not_fit_the_context_are_refused_with_a_number_that_fits(tmp_path: Path) -> None:
    export = folder_export("tiny", build_export(tmp_path))
    material = Material(pools=example_pools(map(sample, range(40)), [question()], seed=0), num_shots=12)
    way = vary(question(), "few_shot", material)
    assert isinstance(way, Asked)
    with pytest.raises(
        ConfigError, match=rf"more than the {CONTEXT} that tiny .*type evaluation\.num_shots=\d+"
    ) as error:
        check_context(export, {"q": way.messages}, num_shots=12, max_new_tokens=16)
    fitting = int(str(error.value).rpartition("=")[2])
    fewer = vary(question(), "few_shot", replace(material, num_shots=fitting))
    assert isinstance(fewer, Asked)
    check_context(export, {"q": fewer.messages}, num_shots=fitting, max_new_tokens=16)


@pytest.mark.parametrize("kind", ROBUSTNESS)
def test_worse_pictures_are_the_same_every_time_and_not_the_picture(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 40, 3)).astype(np.uint8)
    picture = Image.fromarray(noise)
    data = transform(picture, kind, "ab" * 32)
    assert data == transform(picture, kind, "ab" * 32)
    changed = np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    assert changed.shape == noise.shape
    assert (changed != noise).any()
    if kind == "occlude":
        grey = (changed == 128).all(axis=-1)
        assert grey.sum() == 14**2  # 35 % of 40 pixels
        assert (changed[~grey] == noise[~grey]).all()
        other = np.asarray(Image.open(BytesIO(transform(picture, kind, "cd" * 32))))
        assert ((other == 128).all(axis=-1) != grey).any()
    if kind == "rotate":
        assert (changed[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
