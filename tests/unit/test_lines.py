"""Micro-batches as one line of tokens: few lengths, the same order, and no token that nothing depends on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from minivlm.model import fast_layers
from minivlm.model.projector import build_projector
from minivlm.model.segments import flatten_rows, line_length
from minivlm.model.vlm import MiniVLM


@pytest.mark.parametrize(
    ("num_tokens", "length"), [(0, 16), (1, 16), (16, 16), (17, 32), (1009, 1024), (1024, 1024), (1025, 1088)]
)
def test_a_line_has_few_lengths(num_tokens: int, length: int) -> None:
    """oneDNN compiles a kernel for each number of rows that it meets and keeps it."""
    assert line_length(num_tokens) == length


@pytest.mark.parametrize("num_tokens", [0, 1, 31, 32, 33, 64])
def test_a_line_keeps_the_order(num_tokens: int) -> None:
    segment_ids = torch.zeros(3, 40, dtype=torch.int64)
    segment_ids.view(-1)[: num_tokens + num_tokens // 2 : 3] = 1
    segment_ids.view(-1)[1 : num_tokens + num_tokens // 2 : 3] = 1
    segment_ids[:, 30:] = 0
    count = int(segment_ids.sum())
    names = ("input_ids", "targets", "position_ids")
    batch = {name: torch.randint(5, 90, (3, 40)) for name in names} | {"segment_ids": segment_ids}
    line = flatten_rows(batch | {"image_index": torch.arange(2)}, 1, is_needed=segment_ids != 0)
    assert line["image_index"].tolist() == [0, 1]
    for name, padding in (("input_ids", 1), ("targets", -100), ("position_ids", 0), ("segment_ids", 0)):
        assert line[name].shape == (1, line_length(count))
        assert torch.equal(line[name][0, :count], batch[name][segment_ids != 0])
        assert (line[name][0, count:] == padding).all()


@given(
    rows=st.lists(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), max_size=3), min_size=1, max_size=3),
    padding=st.integers(0, 2),
)
def test_what_follows_the_last_needed_token_of_a_sample_is_left_out(rows: list[list[list[bool]]], padding: int) -> None:
    width = max(sum(map(len, row)) for row in rows) + padding
    segment_ids, is_needed = torch.zeros(len(rows), width, dtype=torch.int64), torch.ones(len(rows), width).bool()
    kept, number = [], 0
    for line, row in enumerate(rows):
        at = 0
        for sample in row:
            number += 1
            segment_ids[line, at : at + len(sample)] = number
            is_needed[line, at : at + len(sample)] = torch.tensor(sample)
            kept += [line * width + at + place for place in range(len(sample)) if any(sample[place:])]
            at += len(sample)
    places = torch.arange(len(rows) * width).view(len(rows), width)
    batch = dict.fromkeys(("input_ids", "targets", "position_ids"), places) | {"segment_ids": segment_ids}
    line = flatten_rows(batch, 0, is_needed)
    assert line["input_ids"][0, : len(kept)].tolist() == kept
    assert line["segment_ids"].count_nonzero() == len(kept)
    assert line["segment_ids"].shape == (1, line_length(len(kept)))


@pytest.mark.parametrize(
    ("rope", "leaves_out"), [({"rope_type": "default"}, True), ({"rope_type": "dynamic", "factor": 4.0}, False)]
)
def test_tails_stay_where_frequencies_depend_on_the_last_position(rope: dict, leaves_out: bool) -> None:
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, vocab_size=64,
        rope_parameters={**rope, "rope_theta": 10_000.0},
    )  # fmt: skip
    vlm = MiniVLM(build_projector("linear", 8, 32), LlamaForCausalLM(config), image_token_id=3)
    fast_layers.use_segment_attention(vlm)
    assert vlm.leaves_out_tails == leaves_out
