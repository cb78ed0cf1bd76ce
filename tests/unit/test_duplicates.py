"""Keys and signatures of rows: what counts as the same, how near is estimated, and that near rows are found."""

import random

import numpy as np
import pytest

from minivlm.data.duplicates import (
    MAX_COMPARED,
    SIGNATURE_BYTES,
    band_width,
    decode_signatures,
    near_duplicates,
    row_key,
    text_signature,
)

LETTERS = random.Random(3)
WORDS = ["".join(LETTERS.choices("abcdefghijklmnopqrstuvwxyz", k=3 + i % 6)) for i in range(2000)]


def sentence(generator: random.Random, length: int = 60) -> list[str]:
    return [generator.choice(WORDS) for _ in range(length)]


def pieces(text: str) -> set[str]:
    return {text[i : i + 5] for i in range(len(text) - 4)}


def signatures(texts: list[str]) -> np.ndarray:
    return decode_signatures([text_signature([text]) for text in texts])


def test_case_width_space_and_placeholders_do_not_count_but_pictures_and_order_do():
    key = row_key(["p"], ["<image>\nWhat is  it?", "A Ball"])
    assert key == row_key(["p"], ["what is it?", "a ball"]) == row_key(["p"], ["ｗhat is it?", " a\nball "])
    others = [row_key(["q"], ["what is it?", "a ball"]), row_key(["p"], ["a ball", "what is it?"])]
    others += [row_key(["p", "what is it?"], ["a ball"]), row_key(["p"], ["what is it? a ball"])]
    assert len({key, *others}) == 5


def test_agreement_of_signatures_estimates_the_share_of_common_pieces():
    generator = random.Random(0)
    errors = []
    for changed in (0, 1, 3, 8, 20):
        words = sentence(generator)
        other = [generator.choice(WORDS) if i < changed else word for i, word in enumerate(words)]
        a, b = " ".join(words), " ".join(other)
        true = len(pieces(a) & pieces(b)) / len(pieces(a) | pieces(b))
        agreement = float((signatures([a])[0] == signatures([b])[0]).mean())
        errors.append(abs((agreement - 1 / 256) / (1 - 1 / 256) - true))
    assert max(errors) < 0.13  # three standard deviations of 120 permutations
    assert errors[0] == 0.0


@pytest.mark.parametrize("text", ["", "a", "狗", "图中有一只狗在草地上奔跑", "a" * 5000])
def test_any_text_has_a_signature_equal_to_itself_alone(text):
    first, second, other = signatures([text, text, "something else, and quite long"])
    assert (first == second).all()
    assert len(first) == SIGNATURE_BYTES
    assert (first == other).mean() < 0.2


def test_one_changed_word_in_sixty_is_found_among_hundreds_and_nothing_else():
    generator = random.Random(1)
    texts = [" ".join(sentence(generator)) for _ in range(600)]
    copies = []
    for place in range(0, 600, 50):
        words = texts[place].split()
        words[30] = "xylophone"
        copies.append(" ".join(words))
    found = near_duplicates(
        signatures(texts + copies),
        np.zeros(612, np.uint64),
        similarity=0.8,
        always_kept=np.zeros(612, bool),
    )
    assert np.flatnonzero(found).tolist() == list(range(600, 612))


def test_bands_compare_what_is_as_similar_as_asked():
    for similarity in (0.5, 0.7, 0.8, 0.9, 0.97):
        width = band_width(similarity)
        assert 1 - (1 - similarity**width) ** (SIGNATURE_BYTES // width) >= 0.99
    assert band_width(0.97) > band_width(0.8) > band_width(0.5)


def test_groups_are_not_mixed_and_kept_rows_stay():
    same = signatures(["one and the same text"] * 4)
    groups = np.array([1, 1, 2, 1], np.uint64)
    kept = np.array([False, True, False, False])
    found = near_duplicates(same, groups, similarity=0.8, always_kept=kept)
    assert found.tolist() == [False, False, False, True]


def test_a_second_pass_drops_nothing_where_buckets_are_full():
    generator = random.Random(2)
    template = "Describe the picture in one or two short sentences, please, and name what you see: "
    texts = [template + " ".join(sentence(generator, 9)) for _ in range(2 * MAX_COMPARED)]
    given = signatures(texts)
    groups, kept = np.zeros(len(texts), np.uint64), np.zeros(len(texts), bool)
    found = near_duplicates(given, groups, similarity=0.6, always_kept=kept)
    left = ~found
    again = near_duplicates(given[left], groups[left], similarity=0.6, always_kept=kept[left])
    assert found.any()
    assert not again.any()


def test_a_row_like_a_dropped_one_alone_is_kept():
    chain = np.zeros((3, SIGNATURE_BYTES), np.uint8)
    chain[1:, 100:] = 1  # the second agrees with the first in 100 of 120 bytes
    chain[2, :20] = 2  # the third with the second in 100, with the first in 80
    found = near_duplicates(chain, np.zeros(3, np.uint64), similarity=0.8, always_kept=np.zeros(3, bool))
    assert found.tolist() == [False, True, False]
