"""Text as it grows: whole characters, stop strings."""

import pytest

from minivlm.serve.text import Detokenizer, StopFilter


def decode_bytes(ids):
    """A tokenizer whose tokens are single bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["a red circle", "红色的圆", "naïve 👩‍👩‍👧 ok", ""])
def test_pieces_joined_are_the_text(text):
    detokenizer = Detokenizer(decode_bytes)
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    assert "".join(pieces) + detokenizer.finish() == text


def test_a_character_of_three_tokens_comes_at_once():
    detokenizer = Detokenizer(decode_bytes)
    assert [detokenizer.push(byte) for byte in "圆a".encode()] == ["", "", "圆", "a"]


def test_an_incomplete_character_at_the_end_is_shown_as_unknown():
    detokenizer = Detokenizer(decode_bytes)
    assert [detokenizer.push(byte) for byte in "a圆".encode()[:2]] == ["a", ""]
    assert detokenizer.finish() == "\ufffd"


def test_broken_bytes_are_kept_in_place():
    detokenizer = Detokenizer(decode_bytes)
    pieces = [detokenizer.push(byte) for byte in b"a\xe4b\xff"]
    assert "".join(pieces) + detokenizer.finish() == "a\ufffdb\ufffd"


def test_text_ends_before_the_stop_string():
    stops = StopFilter(["END"])
    shown = [stops.push(piece) for piece in ["red E", "N", "D blue"]]
    assert (shown, stops.stopped, stops.finish()) == (["red ", "", ""], True, "")


def test_a_false_start_of_a_stop_string_is_released():
    stops = StopFilter(["END"])
    assert [stops.push(piece) for piece in ["E", "N", "x"]] == ["", "", "ENx"]


def test_held_text_comes_out_at_the_end():
    stops = StopFilter(["END"])
    assert stops.push("blue EN") == "blue "
    assert stops.finish() == "EN"


def test_the_first_of_two_stop_strings_in_one_piece_wins():
    stops = StopFilter(["two", "one"])
    assert stops.push("0 one two") == "0 "


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_cut_does_not_depend_on_the_pieces(size):
    text = "ababab abc and more"
    stops = StopFilter(["abc"])
    shown = "".join(stops.push(text[at : at + size]) for at in range(0, len(text), size)) + stops.finish()
    assert shown == "ababab "
