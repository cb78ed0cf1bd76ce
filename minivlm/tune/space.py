"""What a search tries: every projector kind with seeded log-uniform learning rates. Pure, apart from the config."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from minivlm.config import Config


@dataclass(frozen=True)
class Trial:
    """One point of the search space."""

    projector: str
    learning_rate: float


def trials(
    projectors: Sequence[str], *, num_trials: int, min_learning_rate: float, max_learning_rate: float, seed: int
) -> list[Trial]:
    """Grid of projector kinds x learning rates, cut to `num_trials`.

    The rates are log-uniform and stratified: of n rates, the i-th comes from the i-th n-th of the logarithmic range,
    so that few trials still cover it. They are rounded to three digits, so that what is printed is what was used.
    """
    num_rates = math.ceil(num_trials / len(projectors))
    draw = random.Random(seed)
    low, high = math.log(min_learning_rate), math.log(max_learning_rate)
    slice_width = (high - low) / num_rates
    rates = [math.exp(low + slice_width * (i + draw.random())) for i in range(num_rates)]
    return [Trial(projector, float(f"{rate:.3g}")) for rate in rates for projector in projectors][:num_trials]


def best_overrides(config: Config, trial: Trial) -> list[str]:
    """What a trial found, as overrides to carry into a full run."""
    return [f"model.projector={trial.projector}", f"train.{config.tune.stage}.learning_rate={trial.learning_rate!r}"]


def trial_overrides(config: Config, trial: Trial) -> list[str]:
    """Everything in which a trial differs from the config, as overrides that reproduce it exactly."""
    tune = config.tune
    return [
        *best_overrides(config, trial),
        f"train.{tune.stage}.max_steps={tune.max_steps}",
        f"train.{tune.stage}.num_evals={tune.num_reports}",
        "train.num_workers=1",
    ]


def trial_config(config: Config, trial: Trial) -> Config:
    """The config that `trial_overrides` describes."""
    tune = config.tune
    changes = {"learning_rate": trial.learning_rate, "max_steps": tune.max_steps, "num_evals": tune.num_reports}
    stage = getattr(config.train, tune.stage).model_copy(update=changes)
    train = config.train.model_copy(update={tune.stage: stage, "num_workers": 1})
    model = config.model.model_copy(update={"projector": trial.projector})
    return config.model_copy(update={"train": train, "model": model})
