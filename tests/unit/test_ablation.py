"""The ablation: what its methods share and differ in, and its table over seeds."""

from pathlib import Path

import pytest

from minivlm import layout
from minivlm.config import ConfigError, load_config
from minivlm.scoring.ablation import Evaluated, compare_methods, describe_table
from minivlm.workflow.ablation import METHODS, describe_plan, method_overrides, run_ablation


def evaluated(scores: list[int], direct: list[int], *, f1: float = 0.9, tokens: float = 50.0, first: int = 0):
    rows = [
        {
            "question_id": f"q{first + i}",
            "task": "reasoning",
            "cluster": f"picture{first + i}",
            "score": float(score),
            "variants": {"direct": {"answer": "", "extracted": None, "score": float(other)}},
        }
        for i, (score, other) in enumerate(zip(scores, direct, strict=True))
    ]
    rows.append({"question_id": "c", "task": "count", "cluster": "other", "score": 0.0, "variants": {}})
    results = {
        "tasks": {"existence": {"metrics": {"f1": f1, "yes_ratio": 0.5}}},
        "caption": {"token_accuracy": 0.8, "metrics": {"chair_i": 0.02}},
    }
    return Evaluated(rows, results, tokens)


def test_figures_are_pooled_over_seeds_and_gains_are_paired():
    before = [evaluated([0, 0, 1, 1], [0, 0, 0, 1]), evaluated([0, 1, 1, 1], [0, 0, 0, 0])]
    after = [evaluated([1, 0, 1, 1], [0, 0, 1, 1], f1=0.8), evaluated([1, 1, 1, 1], [0, 0, 0, 1], f1=0.6, tokens=60.0)]
    sft, mpo = compare_methods({"SFT": before, "MPO": after}, baseline="SFT")
    assert sft.cot[0] == 5 / 8
    assert sft.gain.difference == 0
    assert mpo.cot[0] == 7 / 8
    assert mpo.direct[0] == 3 / 8
    assert mpo.gain.difference == pytest.approx(2 / 8)
    assert mpo.gains == (0.25, 0.25)
    assert mpo.pope_f1 == pytest.approx(0.7)
    assert mpo.answer_tokens == 55
    assert (mpo.yes_ratio, mpo.chair_i, mpo.caption_accuracy) == (0.5, 0.02, 0.8)


def test_equal_picture_names_of_two_seeds_are_different_pictures():
    rows = evaluated([1, 0], [0, 0])
    once, twice = (compare_methods({"SFT": [rows] * n}, baseline="SFT")[0].cot for n in (1, 2))
    assert twice[2] - twice[1] < once[2] - once[1]


def test_the_table_is_in_per_cent_and_points():
    before, after = evaluated([0, 0, 1, 1], [0, 0, 0, 1]), evaluated([1, 0, 1, 1], [0, 0, 1, 1])
    lines = describe_table(compare_methods({"SFT": [before], "MPO": [after]}, baseline="SFT")).splitlines()
    assert lines[0].startswith("| method | reasoning, CoT |")
    assert lines[3].startswith("| MPO | 75.0 (")
    assert "| +25.0 (" in lines[3]
    assert lines[3].endswith("| 90.0 | 50.0 | 2.00 | 80.0 | 50.0 |")


def test_other_questions_or_seeds_than_the_baselines_are_refused():
    before = evaluated([0, 1], [0, 0])
    with pytest.raises(ValueError, match="other questions"):
        compare_methods({"SFT": [before], "MPO": [evaluated([0, 1], [0, 0], first=5)]}, baseline="SFT")
    with pytest.raises(ValueError, match="2 seeds"):
        compare_methods({"SFT": [before], "MPO": [before, before]}, baseline="SFT")


def test_methods_train_on_the_same_pairs_with_other_weights(tiny_config: Path):
    configs = {name: load_config(tiny_config, method_overrides(name)) for name in METHODS}
    assert len({layout.pairs_dir(config) for config in configs.values()}) == 1
    assert len({layout.run_dir(config, "sft") for config in configs.values()}) == 1
    assert len({layout.run_dir(config, "mpo") for config in configs.values()}) == len(METHODS)
    settings = configs["MPO"].train.mpo
    assert (settings.dpo_weight, settings.bco_weight, settings.sft_weight) == (0.8, 0.2, 1.0)
    alone = configs["SFT on chosen"].train.mpo
    assert (alone.dpo_weight, alone.bco_weight, alone.sft_weight) == (0.0, 0.0, 1.0)


def test_the_plan_names_every_method_and_its_weights():
    plan = describe_plan([3, 4], second_round=True)
    assert "seeds 3, 4" in plan
    assert "MPO, second round: weights of L_p, L_q, L_g 0.8 0.2 1.0" in plan
    assert all(f"\n{name}: " in plan for name in METHODS)


@pytest.mark.parametrize(
    ("overrides", "seeds", "message"),
    [
        (["miniworld.direct_reasoning_fraction=1"], [], "different seeds"),
        (["miniworld.direct_reasoning_fraction=1"], [1, 1], "type --seed 0 --seed 1"),
        ([], [0], "miniworld.direct_reasoning_fraction=1"),
        (["data.pretrain=[{path: a.json}]", "data.sft=[{path: a.json}]"], [0], "remove data.pretrain"),
        (["preferences.policy=/models/mine"], [0], "preferences.policy"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(tiny_config: Path, overrides, seeds, message):
    with pytest.raises(ConfigError, match=message):
        run_ablation(tiny_config, overrides, seeds=seeds, second_round=False)
