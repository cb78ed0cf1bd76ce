"""The search space: what is tried, how it is written down."""

import math
from pathlib import Path

import pytest

from minivlm.config import Config, load_config
from minivlm.tune.space import Trial, best_overrides, trial_config, trial_overrides, trials

SPACE = {"projectors": ("linear", "mlp2x_gelu"), "min_learning_rate": 1e-4, "max_learning_rate": 1e-2}


def test_every_projector_is_tried_with_the_same_rates():
    points = trials(**SPACE, num_trials=6, seed=0)
    rates = {kind: [p.learning_rate for p in points if p.projector == kind] for kind in SPACE["projectors"]}
    assert len(points) == len(set(points)) == 6
    assert rates["linear"] == rates["mlp2x_gelu"]


@pytest.mark.parametrize("seed", range(5))
def test_rates_cover_the_logarithmic_range_slice_by_slice(seed):
    rates = [p.learning_rate for p in trials(**SPACE, num_trials=8, seed=seed) if p.projector == "linear"]
    slices = [math.floor((math.log10(rate) + 4) / 2 * 4) for rate in rates]  # 4 slices of half a decade from 1e-4
    assert slices == [0, 1, 2, 3]


def test_the_seed_alone_decides_what_is_tried():
    assert trials(**SPACE, num_trials=4, seed=3) == trials(**SPACE, num_trials=4, seed=3)
    assert trials(**SPACE, num_trials=4, seed=3) != trials(**SPACE, num_trials=4, seed=4)


def test_the_number_of_trials_is_kept_where_the_grid_does_not_fill():
    assert len(trials(**SPACE, num_trials=5, seed=0)) == 5


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_printed_overrides_reproduce_the_trial_exactly(tmp_path: Path, stage: str):
    file = tmp_path / "config.yaml"
    file.write_text(f"storage_path: {tmp_path}\ntune: {{stage: {stage}, max_steps: 7, num_reports: 2}}\n")
    config = load_config(file)
    kinds = ("linear", "mlp2x_gelu", "pixel_shuffle", "resampler")
    for trial in trials(**SPACE | {"projectors": kinds}, num_trials=4, seed=0):
        assert load_config(file, trial_overrides(config, trial)) == trial_config(config, trial)


def test_the_best_overrides_carry_projector_and_rate_but_not_the_short_schedule():
    found = best_overrides(Config(), Trial("linear", 0.00123))
    assert found == ["model.projector=linear", "train.pretrain.learning_rate=0.00123"]
