"""The ablation's table over seeds, from rows and results as evaluations write them."""

import pytest

from minivlm.scoring.ablation import Evaluated, compare_methods, describe_table


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
