"""Learning rates over the steps, by hand."""

import pytest

from minivlm.train.optimizer import OptimizerSettings, learning_rate_at


def test_warm_up_then_cosine_to_zero():
    settings = OptimizerSettings(1.0, warmup_fraction=0.2)
    rates = [learning_rate_at(step, 10, settings) for step in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])


def test_wsd_stays_at_the_peak_and_decays_by_one_minus_sqrt():
    settings = OptimizerSettings(1.0, warmup_fraction=0.2, schedule="wsd", decay_fraction=0.4)
    rates = [learning_rate_at(step, 10, settings) for step in (0, 1, 2, 6, 7, 9, 10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 1 - 0.25**0.5, 1 - 0.75**0.5, 0.0])


@pytest.mark.parametrize(("schedule", "halfway"), [("cosine", 0.1 + 0.9 * 0.5), ("wsd", 0.1 + 0.9 * (1 - 0.5**0.5))])
def test_a_least_rate_is_where_the_schedule_ends(schedule: str, halfway: float):
    settings = OptimizerSettings(2.0, min_lr_fraction=0.1, schedule=schedule, decay_fraction=1.0)
    rates = [learning_rate_at(step, 10, settings) for step in (0, 5, 10)]
    assert rates == pytest.approx([2.0, 2 * halfway, 0.2])
