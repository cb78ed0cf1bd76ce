"""Samples that are too long: set aside with file and row, never cut, and a failure above the allowed share."""

import json
from collections.abc import Sequence

import pytest

from minivlm.data.errors import DataError
from minivlm.data.lengths import encode_rows
from minivlm.schema import Message, Sample


def encode(messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """One token per character."""
    ids = [ord(character) for character in messages[0].content]
    return ids, [-100, *ids[1:]]


def rows(*texts: str) -> list[tuple[Sample, str, int]]:
    return [
        (Sample(str(i), (), (), (Message("user", text),), "sft", "train", "t"), "f.json", i + 1)
        for i, text in enumerate(texts)
    ]


def test_a_row_over_the_limit_is_listed_and_the_others_stay_whole(tmp_path):
    quarantine = tmp_path / "q.jsonl"
    kept = list(
        encode_rows(rows("abc", "abcd", "ab"), encode, max_length=3, max_bad_fraction=0.5, quarantine=quarantine)
    )
    assert [sample.input_ids.tolist() for sample in kept] == [[97, 98, 99], [97, 98]]
    assert json.loads(quarantine.read_text()) == {
        "file": "f.json",
        "row": 2,
        "reason": "4 tokens, more than model.max_length_tokens=3",
    }


def test_too_many_long_rows_fail_and_name_the_first(tmp_path):
    with pytest.raises(
        DataError, match=r"1 of 2 rows are too long.*f\.json, row 2: 4 tokens.*model\.max_length_tokens"
    ):
        list(encode_rows(rows("abc", "abcd"), encode, max_length=3, max_bad_fraction=0.4, quarantine=tmp_path / "q"))
