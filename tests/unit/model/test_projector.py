"""Projectors: which features land in which token, their sizes, and how a new one is fitted to what it will see."""

import pytest
import torch
from torch.testing import assert_close

from minivlm.model.image_tokens import PROJECTOR_SIZES, count_image_tokens, patch_grid
from minivlm.model.projector import build_projector, describe_projector, pixel_shuffle, whiten_input

KINDS = list(PROJECTOR_SIZES)
SIZES = {"pixel_shuffle_factor": 2, "resampler_queries": 6, "resampler_layers": 2, "resampler_heads": 4}


def build(kind, **changes):
    return build_projector(kind, 16, 64, num_features=17, sizes=SIZES | changes)


def lopsided_features() -> torch.Tensor:
    """Features with one direction of variance 100 times that of the others, far from 0; a class token and 4 x 4."""
    torch.manual_seed(0)
    return torch.randn(40, 17, 16) * torch.tensor([10.0] + [1.0] * 15) + 3.0


def first_layer_outputs(kind, projector, features):
    with torch.no_grad():
        return projector.linear_1(pixel_shuffle(features, 2) if kind == "pixel_shuffle" else features).flatten(0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_no_direction_of_the_features_drowns_the_others(kind):
    features = lopsided_features()
    shares = []
    for is_whitened in (False, True):
        projector = build(kind)
        if is_whitened:
            whiten_input(projector, features)
        seen = first_layer_outputs(kind, projector, features)
        variances = torch.linalg.svdvals(seen - seen.mean(dim=0)) ** 2
        largest = projector.linear_1.in_features // 16  # one for each patch that a token is made of
        shares.append(float(variances[:largest].sum() / variances.sum()))
    assert shares[0] > 0.7
    assert shares[1] < 0.3
    assert float(seen.std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "pixel_shuffle", "resampler"])
def test_with_a_bias_the_mean_goes_too(kind):
    features = lopsided_features()
    projector = build(kind)
    bias = projector.linear_1.bias.clone()
    whiten_input(projector, features)
    assert_close(first_layer_outputs(kind, projector, features).mean(dim=0), bias, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_constant_features_stay_finite(kind):
    projector = build(kind)
    whiten_input(projector, torch.ones(1, 17, 16))
    assert torch.isfinite(projector(torch.ones(1, 17, 16))).all()


@pytest.mark.parametrize(
    ("side", "factor", "class_tokens"), [(4, 2, 0), (4, 2, 1), (6, 3, 1), (7, 2, 1), (7, 3, 0), (5, 4, 1), (3, 3, 0)]
)
def test_pixel_shuffle_puts_every_patch_where_a_plain_loop_does(side, factor, class_tokens):
    features = torch.randn(2, side * side + class_tokens, 3)
    patches = features[:, class_tokens:].reshape(2, side, side, 3)
    tokens = []
    for top in range(0, side, factor):
        for left in range(0, side, factor):
            square = [
                patches[:, min(row, side - 1), min(column, side - 1)]  # beyond the edge: the edge again
                for row in range(top, top + factor)
                for column in range(left, left + factor)
            ]
            tokens.append(torch.cat(square, dim=-1))
    assert torch.equal(pixel_shuffle(features, factor), torch.stack(tokens, dim=1))


def test_pixel_shuffle_by_hand():
    """A class token 9 and the patches 0 1 2 / 3 4 5 / 6 7 8, by twos."""
    features = torch.tensor([[9.0, 0, 1, 2, 3, 4, 5, 6, 7, 8]]).unsqueeze(-1)
    squares = [[0, 1, 3, 4], [2, 2, 5, 5], [6, 7, 6, 7], [8, 8, 8, 8]]
    assert pixel_shuffle(features, 2).tolist() == [squares]


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("linear", 16 * 64),
        ("mlp2x_gelu", 16 * 64 + 64 + 64 * 64 + 64),
        ("pixel_shuffle", 4 * 16 * 64 + 64 + 64 * 64 + 64),
        # Input layer, 6 queries, 2 blocks of 12 W^2 weights and 3 norms, last norm and output layer.
        ("resampler", 16 * 64 + 64 + 6 * 64 + 2 * (12 * 64**2 + 3 * 2 * 64) + 2 * 64 + 64 * 64 + 64),
    ],
)
def test_parameters_by_hand(kind, count):
    assert sum(parameter.numel() for parameter in build(kind).parameters()) == count


@pytest.mark.parametrize(
    ("kind", "tokens"), [("linear", 17), ("mlp2x_gelu", 17), ("pixel_shuffle", 4), ("resampler", 6)]
)
def test_the_count_is_that_of_the_tokens(kind, tokens):
    assert count_image_tokens(kind, 17, SIZES) == tokens
    assert build(kind)(torch.randn(3, 17, 16)).shape == (3, tokens, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_description_is_enough_to_build_it_again(kind):
    projector = build(kind)
    again, sizes = describe_projector(projector)
    assert again == kind
    build_projector(again, 16, 64, num_features=17, sizes=sizes).load_state_dict(projector.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_other_pictures_of_the_batch_change_no_bit(kind):
    projector, features = build(kind).eval(), torch.randn(4, 17, 16)
    before = projector(features)[1]
    others = torch.randn(4, 17, 16)
    others[1] = features[1]
    assert torch.equal(projector(others)[1], before)
    assert_close(projector(features[1:2])[0], before, atol=1e-5, rtol=0)


def test_an_impossible_factor_says_what_to_type():
    with pytest.raises(ValueError, match=r"3 x 3 patches: type model\.pixel_shuffle_factor=2 to 3"):
        count_image_tokens("pixel_shuffle", 10, {"pixel_shuffle_factor": 4})


@pytest.mark.parametrize(("features", "side"), [(1, 1), (2, 1), (4, 2), (5, 2), (49, 7), (50, 7), (729, 27)])
def test_the_grid_follows_from_the_number_of_features(features, side):
    assert patch_grid(features) == side


@pytest.mark.parametrize("features", [0, 3, 48, 51])
def test_what_is_no_square_is_refused(features):
    with pytest.raises(ValueError, match=f"{features} features"):
        patch_grid(features)
