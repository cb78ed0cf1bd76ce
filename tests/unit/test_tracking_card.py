"""From evaluation results to metrics and the model card."""

from mlflow.utils.validation import _validate_metric_name

from minivlm.config import Config
from minivlm.tracking.card import gate_section, model_card, result_metrics


def figures(accuracy: float) -> dict:
    variants = {"shuffled": {"accuracy": 0.25, "n": 100, "low": 0.2, "high": 0.3}}
    return {
        "n": 100,
        "accuracy": accuracy,
        "low": accuracy - 0.05,
        "high": accuracy + 0.05,
        "variants": variants,
        "metrics": {},
    }


RESULTS = {
    "name": "mpo", "stage": "mpo", "questions": "q1", "num_questions": 206,
    "macro_questions": 200,
    "macro": 0.85, "macro_low": 0.8, "macro_high": 0.9, "shuffled_macro": 0.25,
    "variants": {"shuffled": {"macro": 0.25, "n": 200, "skipped": {}}},
    "tasks": {"colour": figures(0.9), "count": figures(0.8)}, "caption": None,
}  # fmt: skip


def test_results_become_metrics_and_the_macro_mean_is_the_gate():
    metrics = result_metrics(RESULTS)
    assert metrics["eval/macro/accuracy"] == 0.85
    assert metrics["eval/count/accuracy"] == 0.8
    assert (metrics["eval/macro/shuffled"], metrics["eval/colour/shuffled"]) == (0.25, 0.25)


def test_captions_alone_are_judged_by_their_tokens():
    caption = {"n": 6, "token_accuracy": 0.95, "low": 0.9, "high": 1.0, "variants": {}, "metrics": {"CIDEr": 1.5}}
    results = RESULTS | {"macro": None, "shuffled_macro": None, "variants": {}, "tasks": {}, "caption": caption}
    metrics = result_metrics(results)
    assert (metrics["eval/macro/accuracy"], metrics["eval/caption/CIDEr"]) == (0.95, 1.5)
    assert "| caption (tokens) | 6 | 95.0 [90.0, 100.0] | - |" in model_card(Config(), [results])


def test_names_of_categories_become_names_that_mlflow_takes():
    names = {'group/biology & chemistry (a), "b"': 0.1, 'group/biology + chemistry (a), "b"': 0.2, "group/..": 0.3}
    task = figures(0.9) | {"metrics": names | {"group/" + "x" * 300: 0.4, "group/图表": 0.5}}
    metrics = result_metrics(RESULTS | {"tasks": {"mmstar": task, "macro": figures(0.6)}})
    for name in metrics:
        _validate_metric_name(name)
        assert len(name) <= 250
    assert metrics["eval/mmstar/group/biology _ chemistry _a__ _b_"] == 0.1
    assert metrics["eval/mmstar/group/biology _ chemistry _a__ _b__2"] == 0.2
    assert (metrics["eval/mmstar/group/_"], metrics["eval/mmstar/group/图表"]) == (0.3, 0.5)
    assert (metrics["eval/macro/accuracy"], metrics["eval/macro/accuracy_2"]) == (0.85, 0.6), "a task called macro"


def test_the_card_shows_every_stage_with_interval_and_shuffled_score():
    first = RESULTS | {
        "name": "sft",
        "stage": "sft",
        "tasks": {"colour": figures(0.6), "count": figures(0.5)},
        "macro": 0.55,
    }
    card = model_card(Config(), [first, RESULTS])
    assert "| task | questions | sft | shuffled | mpo | shuffled |" in card
    assert "| **macro** (without caption) | 200 | 55.0" in card
    assert "| colour | 100 | 60.0 [55.0, 65.0] | 25.0 | 90.0 [85.0, 95.0] | 25.0 |" in card
    assert "LlavaForConditionalGeneration.from_pretrained" in card


def test_the_card_says_which_library_loads_the_model():
    stock, own = (model_card(Config(model={"projector": kind}), [RESULTS]) for kind in ("linear", "resampler"))
    assert "LlavaForConditionalGeneration.from_pretrained(FOLDER)" in stock
    assert "LlavaForConditionalGeneration" not in own
    assert "Plain transformers cannot load it" in own
    assert "load_export(FOLDER)" in own


def test_the_gates_table_stays_a_table_whatever_was_measured():
    section = gate_section([("complete", True, "a |\nb"), ("better", None, "not looked at")], 3, "complete")
    assert "Version 3 was refused by gate `complete`" in section
    assert "| complete | passed | a / b |" in section
    assert "| better | - | not looked at |" in section
