"""Rating columns: read beside the rows, applied answer by answer, pictures kept in their order."""

import pytest

from minivlm.data.errors import RowError
from minivlm.data.formats import rated_columns
from minivlm.data.ratings import keep_answers, passing_answers, read_ratings
from minivlm.schema import Message, Sample


def conversation(*questions: str, pictures: int, system: str | None = None) -> Sample:
    turns = [Message("system", system)] if system else []
    for number, question in enumerate(questions):
        turns += [Message("user", question), Message("assistant", f"answer {number}")]
    names = tuple(f"{i}.png" for i in range(pictures))
    return Sample("s", names, names, tuple(turns), "sft", "train", "t")


def test_a_number_counts_for_every_answer_and_a_list_for_each():
    row = {"relevance_ratings": [5, None, 2], "similarity": 0.3}
    assert read_ratings(row, ["relevance_ratings", "similarity", "absent"], 3) == [[5, None, 2], [0.3] * 3, None]


@pytest.mark.parametrize(
    ("value", "reason"),
    [([1, 2], "2 ratings for 3"), ("high", "must be a number"), ([1, True, 2], "must be a number"), ({}, "a number")],
)
def test_a_rating_of_another_kind_sets_the_row_aside(value, reason):
    with pytest.raises(RowError, match=reason):
        read_ratings({"r": value}, ["r"], 3)


def test_every_threshold_must_be_met_and_what_is_unrated_stays():
    ratings = [[5.0, 1.0, None], [4.0, 4.0, 2.0], None]
    assert passing_answers(ratings, [3, 3, 9]) == [True, False, False]
    assert passing_answers(ratings, [1, 2, 9]) is None
    assert passing_answers([None], [3]) is None


def test_pictures_of_a_dropped_question_move_to_the_next_that_stays():
    sample = conversation("<image>\nfirst?", "second?", "<image> third?", pictures=2, system="Be brief.")
    kept = keep_answers(sample, [False, True, True])
    assert [turn.content for turn in kept.messages] == [
        "Be brief.", "<image>\nsecond?", "answer 1", "<image> third?", "answer 2",
    ]  # fmt: skip
    assert kept.images == kept.image_sha256 == ("0.png", "1.png")


def test_pictures_that_only_dropped_questions_at_the_end_show_go_too():
    sample = conversation("<image>\nfirst?", "<image>\nsecond?", pictures=2)
    kept = keep_answers(sample, [True, False])
    assert kept.messages == sample.messages[:2]
    assert kept.images == ("0.png",)


def test_ratings_of_a_webdataset_stand_in_its_json_member():
    row = {"__key__": "1", "jpg": b"", "json": b'{"caption": "x", "similarity": 0.4}'}
    assert read_ratings(rated_columns(row), ["similarity"], 1) == [[0.4]]
    assert read_ratings(rated_columns({"similarity": 0.1}), ["similarity"], 1) == [[0.1]]
