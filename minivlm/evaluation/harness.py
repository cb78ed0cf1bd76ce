"""An evaluation once more, in the files that lmms-eval writes, so that its tools (`--baseline`, its tables) read ours.

    FOLDER/lmms_eval/MODEL/DATE_results.json          figures per task as `METRIC,FILTER`
    FOLDER/lmms_eval/MODEL/DATE_samples_TASK.jsonl    doc_id, input, target, resps, filtered_resps, doc_hash, metrics

FILTER is `none` for the plain question and else the variant in which it was asked. Called by `write_results`.
Layout: EvolvingLMMs-Lab/lmms-eval 0.7.3, loggers/evaluation_tracker.py and evaluator_utils.py.
"""

import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from minivlm.evaluation.tasks import CAPTION
from minivlm.model.tokenizer import CHAT_TEMPLATE
from minivlm.storage import write_bytes, write_json

HARNESS_DIR = "lmms_eval"
LOWER_IS_BETTER = {"chair_i", "chair_s", "unclear", "unpaired"}
NO_DIRECTION = {"yes_ratio"}
"""Metrics that are better where they are near the truth's own; they get no arrow."""


def write_harness_files(
    folder: Path, rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any], *, date: datetime
) -> Path:
    """Write both kinds of file; those of an earlier attempt are replaced. Returns the results file.

    Args:
        rows, results: what samples.jsonl and results.json hold.
        date: names the files, to the second.
    """
    shutil.rmtree(folder / HARNESS_DIR, ignore_errors=True)
    target = folder / HARNESS_DIR / safe_name(results["name"])
    stamp = date.strftime("%Y%m%d_%H%M%S")
    figures = results["tasks"] | ({CAPTION: results["caption"]} if results["caption"] else {})
    by_task: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        own = by_task[row["task"]]
        own.append(_sample(len(own), row, figures[row["task"]]["measure"]))
    for task, samples in by_task.items():
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        write_bytes(target / f"{stamp}_samples_{safe_name(task)}.jsonl", lines.encode())
    path = target / f"{stamp}_results.json"
    write_json(path, _aggregated(results, figures, by_task, stamp))
    return path


def safe_name(name: str) -> str:
    """A name as part of a file name, at most 100 characters; lmms-eval replaces the same ones."""
    return re.sub(r"[\"<>:/|\\?*\[\]\s]+", "__", name).strip(".")[:100] or "_"


def _sample(number: int, row: Mapping[str, Any], measure: str) -> dict[str, Any]:
    document = {"question": row["question"], "target": row["truth"], "images": row["cluster"]}
    kept = row["answer"] if row["extracted"] is None else row["extracted"]
    return {
        "doc_id": number,
        "input": row["question"],
        "target": row["truth"],
        "resps": [row["answer"]],
        "filtered_resps": [kept],
        "doc_hash": _sha256(json.dumps(document, indent=2, ensure_ascii=False)),
        "score": row["score"],  # what lmms-eval's --baseline compares
        **row["metrics"],
        measure: row["score"],
        **{f"{measure}_{name}": variant["score"] for name, variant in row["variants"].items()},
    }


def _aggregated(
    results: Mapping[str, Any],
    figures: Mapping[str, Mapping[str, Any]],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    stamp: str,
) -> dict[str, Any]:
    return {
        "results": {task: _figures(task, own) for task, own in figures.items()},
        "group_subtasks": {task: [] for task in figures},
        "configs": {
            task: {
                "task": task,
                "output_type": "generate_until",
                "repeats": 1,
                "generation_kwargs": {"do_sample": False},
            }
            for task in figures
        },
        "versions": dict.fromkeys(figures, results["questions"]),
        "n-shot": dict.fromkeys(figures, 0),
        "higher_is_better": {task: _directions(own) for task, own in figures.items()},
        "n-samples": {task: {"original": own["n"], "effective": own["n"]} for task, own in figures.items()},
        "config": {"model": "minivlm", "model_args": f"pretrained={results['checkpoint']}", "limit": None},
        "date": stamp,
        "task_hashes": {
            task: _sha256("".join(f"sample_{number}{row['doc_hash']}" for number, row in enumerate(own)))
            for task, own in samples.items()
        },
        "model_source": "minivlm",
        "model_name": results["name"],
        "model_name_sanitized": safe_name(results["name"]),
        "model_sha": results["reference"],
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": None,
        "chat_template": CHAT_TEMPLATE,
        "chat_template_sha": _sha256(CHAT_TEMPLATE),
        "start_time": None,
        "end_time": None,
        "total_evaluation_time_seconds": None,  # checkpoints are evaluated side by side: none has a time of its own
    }


def _figures(task: str, own: Mapping[str, Any]) -> dict[str, Any]:
    measure = own["measure"]
    found: dict[str, Any] = {"alias": task}
    found |= {f"{name},none": value for name, value in own["metrics"].items()}
    found[f"{measure},none"] = own["token_accuracy" if task == CAPTION else "accuracy"]
    found |= {f"{measure}_stderr,none": own["error"], f"{measure}_stderr_clustered,none": own["error"]}
    found |= {f"{measure},{name}": variant["accuracy"] for name, variant in own["variants"].items()}
    return found | {"samples": own["n"]}


def _directions(own: Mapping[str, Any]) -> dict[str, bool]:
    names = [name for name in (own["measure"], *own["metrics"]) if name not in NO_DIRECTION]
    return {name: name not in LOWER_IS_BETTER for name in names}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
