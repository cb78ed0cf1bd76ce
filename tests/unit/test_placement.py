"""What cannot be scheduled is refused before anything starts, encoders beside the trainer counted."""

from pathlib import Path

import pytest

from minivlm.config import Config, ConfigError, load_config
from minivlm.train.placement import check_placement
from minivlm.workflow.dry_run import describe

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def config(*overrides: str) -> Config:
    return load_config(TINY, list(overrides))


def test_encoders_beside_the_trainer_need_their_cpus_too():
    small = config("train.num_workers=2", "train.cpus_per_worker=0.5", "clip.cpus_per_encoder=0.5")
    check_placement(small, cpus=2.0, gpus=0, encoders_beside=False)
    check_placement(small, cpus=2.5, gpus=0, encoders_beside=True)
    with pytest.raises(ConfigError, match=r"need 2\.5 CPUs, the cluster has 2.*data\.features=cached"):
        check_placement(small, cpus=2.0, gpus=0, encoders_beside=True)


@pytest.mark.parametrize(
    ("share", "count", "fits"), [(0.25, 8, True), (0.25, 9, False), (0.4, 4, True), (0.4, 5, False)]
)
def test_shares_of_gpus_must_fit_on_what_the_trainers_leave(share, count, fits):
    wide = config(
        "train.num_workers=2", "train.use_gpu=true", f"clip.num_encoders={count}", f"clip.gpus_per_encoder={share}"
    )
    if fits:
        check_placement(wide, cpus=64.0, gpus=4, encoders_beside=True)
    else:
        with pytest.raises(ConfigError, match=r"have room for \d: nothing would ever start"):
            check_placement(wide, cpus=64.0, gpus=4, encoders_beside=True)


def test_the_dry_run_counts_the_encoders_and_says_what_would_be_refused():
    text = describe(config("data.features=stream", "cluster.num_cpus=2"))
    assert "at once          3 CPUs, 0 GPUs: trainers, encoders and data tasks of a stage" in text
    assert "refused          train.num_workers=2 x train.cpus_per_worker=0.5, clip.num_encoders=1" in text
    assert "refused" not in describe(config("cluster.num_cpus=2"))


@pytest.mark.parametrize(
    ("workers", "cpus", "advice"),
    [(4, 3.0, "train.cpus_per_worker=0.5"), (40, 2.0, "train.num_workers=10 train.cpus_per_worker=0.1"), (2, 1.0, "")],
)
def test_what_to_type_against_too_few_cpus_fits(workers, cpus, advice):
    with pytest.raises(ConfigError) as caught:
        check_placement(config(f"train.num_workers={workers}", "train.cpus_per_worker=9"), cpus=cpus, gpus=0,
                        encoders_beside=False)  # fmt: skip
    if advice:
        assert f"Type {advice}" in str(caught.value)
        fitting = config(f"train.num_workers={workers}", *advice.split())
        check_placement(fitting, cpus=cpus, gpus=0, encoders_beside=False)
    else:
        assert "Give the cluster more CPUs" in str(caught.value)


@pytest.mark.parametrize(("gpus", "advice"), [(3, "Type train.num_workers=3"), (0, "Type train.use_gpu=false")])
def test_what_to_type_against_too_few_gpus(gpus, advice):
    wide = config("train.num_workers=4", "train.use_gpu=true")
    with pytest.raises(ConfigError) as caught:
        check_placement(wide, cpus=64.0, gpus=gpus, encoders_beside=False)
    assert str(caught.value).endswith(advice)
