"""From evaluation results (results.json of each stage, as read) to logged metrics and to the model card."""

import re
from collections.abc import Container, Mapping, Sequence
from itertools import count
from pathlib import PurePath
from typing import Any

from minivlm import layout
from minivlm.config import STAGE_NAMES, Config
from minivlm.tracking.registry import GATE_METRIC

MAX_NAME = 240
"""Characters of a metric's name; MLflow allows 250."""

LIMITS = """\
- Small: it knows the tasks, pictures and languages of its training data, and nothing of the world beyond them.
- Answers can be wrong with confidence; the shuffled column says how far it gets without the right picture.
- Trained for research and teaching. Not for decisions about people, safety or health."""

LOADING = """\
```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained(FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER)
messages = [{"role": "user", "content": [{"type": "image", "path": PICTURE}, {"type": "text", "text": QUESTION}]}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                       return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```"""

OWN_LOADING = """\
Plain transformers cannot load it: LLaVA has no projector of this kind. In a checkout of minivlm:

```python
from minivlm.model.export import load_export, load_export_tower

export, tower = load_export(FOLDER), load_export_tower(FOLDER, batch_size=1)
```"""


def result_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Figures of one results.json as metrics: `eval/TASK/accuracy`, `eval/TASK/VARIANT`, further figures of tasks
    (`eval/TASK/f1`, ...), and the macro means.

    The gate's `eval/macro/accuracy` is the mean over all tasks but caption; where captions are all there is, their
    token accuracy. A figure of nothing (None) is left out. Names are made such that MLflow takes them: categories of
    benchmarks are any text ("biology & chemistry").
    """
    gate: float | None = results["macro"]
    metrics: dict[str, float | None] = {}
    metrics |= {f"eval/macro/{name}": figures["macro"] for name, figures in results["variants"].items()}
    for task, figures in results["tasks"].items():
        metrics |= {f"eval/{task}/{name}": value for name, value in figures["metrics"].items()}
        metrics[f"eval/{task}/accuracy"] = figures["accuracy"]
        metrics |= _variant_metrics(task, figures)
    if caption := results["caption"]:
        metrics |= {f"eval/caption/{name}": value for name, value in caption["metrics"].items()}
        metrics["eval/caption/token_accuracy"] = caption["token_accuracy"]
        metrics |= _variant_metrics("caption", caption)
        if results["macro"] is None:
            gate = caption["token_accuracy"]
    named = {} if gate is None else {GATE_METRIC: float(gate)}
    for key, value in metrics.items():
        if value is not None:
            named[_free_name(_metric_name(key), named)] = float(value)
    return named


def _metric_name(key: str) -> str:
    """Letters, digits and `_.- /` as MLflow allows, no part of a path that means another place, and its length."""
    parts = [re.sub(r"[^\w.\- ]", "_", part) for part in key.split("/")]
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)[:MAX_NAME].rstrip("/")


def _free_name(name: str, taken: Container[str]) -> str:
    """The name, with a number where another figure has it already."""
    if name not in taken:
        return name
    return next(longer for number in count(2) if (longer := f"{name}_{number}") not in taken)


def _variant_metrics(task: str, figures: Mapping[str, Any]) -> dict[str, float]:
    return {f"eval/{task}/{name}": variant["accuracy"] for name, variant in figures["variants"].items()}


def model_card(config: Config, results: Sequence[Mapping[str, Any]]) -> str:
    """The README.md of a registered version.

    Args:
        results: results.json of each evaluated stage, in the order of training; the last one is the model itself.
    """
    final = results[-1]
    language = config.model.language_model
    data = "the embedded miniworld (drawn scenes with known truth)" if config.uses_miniworld else _sources(config)
    held_out = "about the pictures that the sources' splits keep for it"
    if config.uses_miniworld:
        held_out = "about pictures that neither training nor search nor early stopping has seen"
    is_stock = config.model.is_stock_llava
    library, layout_text = "minivlm", "which this project loads"
    if is_stock:
        library, layout_text = "transformers", "in the layout of `LlavaForConditionalGeneration`"
    front = f"---\npipeline_tag: image-text-to-text\nlibrary_name: {library}\ntags: [llava, minivlm]\n---"
    return f"""{front}
# {config.tracking.model_name}

A small vision-language model: vision tower ({config.clip.path or "trained on the same pairs"}, frozen),
`{config.model.projector}` projector, {language.path or f"{language.architecture} language model trained from scratch"}.
It is the model after the `{final["name"]}` stage, {layout_text}.

## Data
Trained on {data}. Rows: `{layout.samples_dir(config).name}`, seed {config.seed}.
Figures below are of the test split: {final["num_questions"]} questions (`{final["questions"]}`)
{held_out}.

## Training
{_recipe(config)}

## Measured
Accuracy in per cent with 95 % interval, clustered by picture. Shuffled: the same questions with other pictures.

{_table(results)}

## Limits
{LIMITS}

## Use
{LOADING if is_stock else OWN_LOADING}
"""


def gate_section(rows: Sequence[tuple[str, bool | None, str]], version: int, outcome: str) -> str:
    """The end of a card: what the gates measured.

    Args:
        rows: gate, whether it let the version through (None: it had nothing to look at), and the figure.
        version: of the registered model.
        outcome: `passed`, or the gate that refused it.
    """
    words = {True: "passed", False: "refused", None: "-"}
    lines = [
        f"| {gate} | {words[passed]} | {' '.join(measured.split()).replace('|', '/')} |"
        for gate, passed, measured in rows
    ]
    decision = "passed every gate" if outcome == "passed" else f"was refused by gate `{outcome}`"
    table = "\n".join(["| gate | outcome | measured |", "|---|---|---|", *lines])
    return f"\n## Gate\nVersion {version} {decision} when it was registered.\n\n{table}\n"


def _sources(config: Config) -> str:
    sources = [*config.data.pretrain, *config.data.sft, *config.data.mpo]
    return ", ".join(f"`{PurePath(source.path).name}`" for source in sources)


def _recipe(config: Config) -> str:
    lines = ["| stage | trained | epochs | most steps | global batch | learning rate |", "|---|---|---|---|---|---|"]
    for stage in STAGE_NAMES:
        own = getattr(config.train, stage)
        steps = own.max_steps or "all"
        lines.append(
            f"| {stage} | {', '.join(own.trainable)} | {own.epochs} | {steps} | {own.global_batch_size} "
            f"| {own.learning_rate:g} |"
        )
    return "\n".join(lines)


def _table(results: Sequence[Mapping[str, Any]]) -> str:
    header = "| task | questions | " + " | ".join(f"{r['name']} | shuffled" for r in results) + " |"
    rows = [header, "|---" * (2 + 2 * len(results)) + "|"]
    for task in results[-1]["tasks"]:
        figures = [result["tasks"].get(task) for result in results]
        cells = " | ".join(_cells(f, "accuracy") if f else "- | -" for f in figures)
        rows.append(f"| {task} | {results[-1]['tasks'][task]['n']} | {cells} |")
    if caption := results[-1]["caption"]:
        figures = [result["caption"] for result in results]
        cells = " | ".join(_cells(f, "token_accuracy") if f else "- | -" for f in figures)
        rows.append(f"| caption (tokens) | {caption['n']} | {cells} |")
    if results[-1]["macro"] is not None:
        macro = " | ".join(
            _figure(r["macro"], r["macro_low"], r["macro_high"]) + f" | {_percent(r['shuffled_macro'])}"
            for r in results
        )
        rows.append(f"| **macro** (without caption) | {results[-1]['macro_questions']} | {macro} |")
    return "\n".join(rows)


def _cells(figures: Mapping[str, Any], name: str) -> str:
    shuffled = figures["variants"].get("shuffled", {}).get("accuracy")
    return f"{_figure(figures[name], figures['low'], figures['high'])} | {_percent(shuffled)}"


def _figure(mean: float | None, low: float | None, high: float | None) -> str:
    return f"{_percent(mean)} [{_percent(low)}, {_percent(high)}]"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
