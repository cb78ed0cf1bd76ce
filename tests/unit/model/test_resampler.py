"""The cross-attention resampler: what its tokens depend on, and what learns."""

import pytest
import torch
from torch.testing import assert_close

from minivlm.model.resampler import ResamplerProjector, grid_positions


def build(num_features=10, heads=4):
    torch.manual_seed(0)
    return ResamplerProjector(16, 64, num_features, num_queries=6, num_layers=2, num_heads=heads)


def test_every_parameter_learns_the_queries_too():
    projector = build()
    projector(torch.randn(3, 10, 16)).square().sum().backward()
    assert [name for name, p in projector.named_parameters() if not p.grad.abs().sum() > 0] == []


def test_no_pictures_still_reach_every_parameter():
    """With ZeRO all ranks must take the same path."""
    projector = build()
    projector(torch.zeros(0, 10, 16)).sum().backward()
    assert [name for name, p in projector.named_parameters() if p.grad is None] == []


def test_tokens_are_those_of_attention_written_out():
    projector = build(heads=1)
    del projector.blocks[1]
    features, block = torch.randn(1, 10, 16), projector.blocks[0]
    with torch.no_grad():
        seen = (projector.linear_1(features) + grid_positions(10, 64))[0]
        normed = block.norm_queries(projector.queries)
        keys, values = block.to_key_value(torch.cat([block.norm_features(seen), normed])).split(64, dim=-1)
        weights = (block.to_query(normed) @ keys.T / 8).softmax(dim=-1)
        queries = projector.queries + block.to_out(weights @ values)
        queries = queries + block.down(torch.nn.functional.gelu(block.up(block.norm_feed_forward(queries))))
        assert_close(projector(features)[0], projector.linear_2(projector.norm(queries)), atol=1e-5, rtol=0)


def test_the_place_of_a_patch_matters():
    projector, features = build(), torch.randn(1, 10, 16)
    swapped = features[:, [0, 2, 1, *range(3, 10)]]
    assert (projector(features) - projector(swapped)).abs().max() > 1e-3
    projector.positions.zero_()
    assert_close(projector(features), projector(swapped), atol=1e-5, rtol=0)


def test_positions_by_hand():
    """Width 4 has one frequency: sine and cosine of the row, then of the column; the class token has none."""
    sine, cosine = torch.tensor(1.0).sin().item(), torch.tensor(1.0).cos().item()
    rows = [[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, sine, cosine], [sine, cosine, 0, 1], [sine, cosine, sine, cosine]]
    assert_close(grid_positions(5, 4), torch.tensor(rows))
    assert_close(grid_positions(4, 4), torch.tensor(rows[1:]))


def test_heads_that_do_not_divide_the_width_say_what_to_type():
    with pytest.raises(ValueError, match=r"resampler_heads=6 must divide .* 64.*type model\.resampler_heads=4"):
        build(heads=6)
