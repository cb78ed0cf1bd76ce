"""Caption metrics by hand: COCO's formulas on a few words, CHAIR on objects that are known."""

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlm.data.miniworld.questions import CHINESE, caption
from minivlm.data.miniworld.scene import COLOURS, SHAPES, draw_any_scene
from minivlm.scoring import chair
from minivlm.scoring.captions import bleu_4, cider_d, rouge_l, tokenize_caption


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The dogs' T-shirt isn't red.", "the dogs t-shirt is n't red"),
        ("A man's 3.5 km (long) walk - cannot!", "a man 's 3.5 km long walk can not"),
        ("“It’s”, 50% off", "it 's 50 % off"),
        ("红色圆环，a1", "红 色 圆 环 a1"),
    ],
)
def test_words_of_a_caption(text: str, words: str) -> None:
    assert " ".join(tokenize_caption(text)) == words


def test_cider_d_by_hand() -> None:
    # every n-gram is in one of two pictures: all weigh ln 2. Equal texts of two words: 1 for orders 1 and 2, else 0.
    # "c x": of its two words one is shared: (ln 2)^2 / (sqrt 2 ln 2)^2 = 1/2 of order 1.
    assert cider_d(["a b", "c x"], [["a b"], ["c d"]]) == pytest.approx([5.0, 1.25])


def test_cider_d_clips_counts_and_penalises_length() -> None:
    # "a a b": counts 2 and 1 against 1 and 1: (1 + 1) / (sqrt 5 sqrt 2) of order 1; bigrams "a a", "a b" against "a b":
    # 1 / sqrt 2; one bigram more: exp(-1 / 72)
    expected = 10 / 4 * (2 / math.sqrt(10) + 1 / math.sqrt(2)) * math.exp(-1 / 72)
    assert cider_d(["a a b", ""], [["a b"], ["c d"]]) == pytest.approx([expected, 0.0])


def test_words_of_every_picture_weigh_nothing() -> None:
    # "the" is in both pictures: ln 2 - ln 2 = 0. "the a" against "the b" shares nothing that weighs.
    assert cider_d(["the a", "the d"], [["the b"], ["the c", "the d"]])[0] == 0.0


def test_rouge_l_by_hand() -> None:
    # common subsequence "a c" of "a b c": precision 2/3, recall 2/2
    precision, recall, square = 2 / 3, 1.0, 1.2**2
    assert rouge_l("a b c", ["a c"]) == pytest.approx((1 + square) * precision * recall / (recall + square * precision))
    assert rouge_l("a c", ["a b c", "c"]) == 1.0  # precision of the first, recall of the second
    assert rouge_l("", ["a"]) == rouge_l("b", ["a"]) == 0.0


def table_common(left: str, right: str) -> int:
    row = [0] * (len(right) + 1)
    for a in left:
        previous = 0
        for j, b in enumerate(right, 1):
            previous, row[j] = row[j], previous + 1 if a == b else max(row[j], row[j - 1])
    return row[-1]


@settings(max_examples=50)
@given(st.text("abc", min_size=1, max_size=9), st.text("abc", min_size=1, max_size=9))
def test_common_subsequence_is_that_of_the_table(left: str, right: str) -> None:
    precision = recall = table_common(left, right)
    precision, recall, square = precision / len(left), recall / len(right), 1.44
    expected = (1 + square) * precision * recall / (recall + square * precision) if precision else 0.0
    assert rouge_l(" ".join(left), [" ".join(right)]) == pytest.approx(expected)


def test_bleu_by_hand() -> None:
    # "a b c d x": 4/5, 3/4, 2/3, 1/2 of one to four words; as long as the reference
    assert bleu_4(["a b c d x"], [["a b c d e"]]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 / 2) ** 0.25)
    assert bleu_4(["a b c d", "e f g h"], [["a b c d"], ["x", "e f g h"]]) == pytest.approx(1.0)  # unequal in number


def test_metrics_of_nothing_are_errors() -> None:
    for metric in (cider_d, bleu_4):
        with pytest.raises(ValueError, match="as many captions as pictures"):
            metric([], [])
        with pytest.raises(ValueError, match="at least one reference"):
            metric(["a"], [[]])


def test_chair_by_hand() -> None:
    rows = [chair.chair_counts(["dog", "cat", "cat"], {"dog", "bird"}), chair.chair_counts(["dog"], {"dog"})]
    assert chair.chair_figures(rows) == {"chair_i": 2 / 4, "chair_s": 1 / 2, "chair_recall": 2 / 3}
    assert chair.chair_figures([chair.chair_counts([], {"dog"})]) == {"chair_s": 0.0, "chair_recall": 0.0}
    assert chair.chair_figures([{}]) == {}


def test_coco_names_in_a_sentence() -> None:
    text = "Two men on bikes pass a traffic light, three buses and a teddy bear's hot dogs."
    assert chair.coco_objects(text) == ["person", "bicycle", "traffic light", "bus", "teddy bear", "hot dog"]
    assert len(set(chair.NAME_OF.values())) == 80


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_miniworlds_captions_tell_their_objects(language: str) -> None:
    for seed in range(20):
        scene = draw_any_scene(Random(seed), 1, 4, with_code=seed % 2 == 0)
        text = caption(scene, Random(seed), language).answer
        assert chair.is_miniworld_caption(text)
        assert chair.miniworld_objects(text) == [f"{s.colour} {s.shape}" for s in scene.shapes]


def test_names_are_the_miniworlds() -> None:
    assert (tuple(chair.COLOURS), tuple(chair.SHAPES)) == (COLOURS, SHAPES)
    assert all(CHINESE[english] == chinese for english, chinese in (chair.COLOURS | chair.SHAPES).items())


def test_another_caption_is_not_taken_for_the_miniworlds() -> None:
    assert not chair.is_miniworld_caption("a red ring on a square table")
    assert not chair.is_miniworld_caption("")
