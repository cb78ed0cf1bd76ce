"""A new projector is fitted to the features that it will see."""

import pytest
import torch

from minivlm.model.projector import build_projector, whiten_input


def lopsided_features() -> torch.Tensor:
    """Features with one direction of variance 100 times that of the others, far from 0."""
    torch.manual_seed(0)
    return torch.randn(40, 10, 16) * torch.tensor([10.0] + [1.0] * 15) + 3.0


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_no_direction_of_the_features_drowns_the_others(kind):
    features = lopsided_features()
    shares = []
    for is_whitened in (False, True):
        projector = build_projector(kind, 16, 64)
        if is_whitened:
            whiten_input(projector, features)
        with torch.no_grad():
            seen = projector.linear_1(features).flatten(0, 1)
        variances = torch.linalg.svdvals(seen - seen.mean(dim=0)) ** 2
        shares.append(float(variances[0] / variances.sum()))
    assert shares[0] > 0.7
    assert shares[1] < 0.25


def test_with_a_bias_the_mean_goes_too():
    features = lopsided_features()
    projector = build_projector("mlp2x_gelu", 16, 64)
    bias = projector.linear_1.bias.clone()
    whiten_input(projector, features)
    assert torch.allclose(projector.linear_1(features).mean(dim=(0, 1)), bias, atol=1e-4)


def test_constant_features_stay_finite():
    projector = build_projector("mlp2x_gelu", 16, 64)
    whiten_input(projector, torch.ones(1, 3, 16))
    assert torch.isfinite(projector(torch.ones(1, 3, 16))).all()
