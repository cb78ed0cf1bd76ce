"""From embedded pictures and texts to recall, zero-shot accuracy, and a table of both. Pure functions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlm.scoring.retrieval import chance_recall, class_embeds, num_ahead
from minivlm.scoring.statistics import mean_interval

RECALL_AT, ACCURACY_AT = (1, 5, 10), (1, 5)
WAYS = ("image_to_text", "text_to_image")


def retrieval_figures(
    captions: Mapping[str, Sequence[str]], images: Mapping[str, np.ndarray], texts: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """recall@1, @5 and @10 both ways, with 95 % intervals clustered by picture, and what chance would give.

    Of a picture's captions any counts, and every caption is a query of its own (COCO's rule). A caption that several
    pictures share, to the letter, is right for each of them: no CLIP can tell which was meant.

    Args:
        captions: texts of each picture, by its digest; at least one.
        images, texts: embeddings by digest and by text.
    """
    pictures = list(captions)
    queries = [(place, text) for place, digest in enumerate(pictures) for text in captions[digest]]
    owners: dict[str, set[int]] = {}
    rows: dict[str, list[int]] = {}
    for row, (place, text) in enumerate(queries):
        owners.setdefault(text, set()).add(place)
        rows.setdefault(text, []).append(row)
    image_rows = _stack([images[digest] for digest in pictures])
    text_rows = _stack([texts[text] for _, text in queries])
    of_picture = [sorted({row for text in captions[digest] for row in rows[text]}) for digest in pictures]
    of_caption = [sorted(owners[text]) for _, text in queries]
    return {
        "num_pictures": len(pictures),
        "num_captions": len(queries),
        "num_shared": sum(len(owners[text]) > 1 for _, text in queries),
        "image_to_text": _recall(image_rows, text_rows, of_picture, pictures),
        "text_to_image": _recall(text_rows, image_rows, of_caption, [pictures[place] for place, _ in queries]),
    }


def zero_shot_figures(
    names: Sequence[str],
    prompts: Sequence[Sequence[np.ndarray]],
    images: Sequence[np.ndarray],
    labels: Sequence[int],
) -> dict[str, Any]:
    """Accuracy@1 and @5 of the most similar class, and accuracy@1 by class. `n` pictures; 95 % intervals.

    Args:
        names: of the C classes.
        prompts: embeddings of each class name in every template.
        images, labels: embedding and class of each picture.
    """
    classes = class_embeds(torch.stack([_stack(row) for row in prompts]))
    ahead = num_ahead(_stack(images), classes, [[label] for label in labels]).tolist()
    per_class = {
        name: {"n": len(own), "accuracy": sum(place < 1 for place in own) / len(own)}
        for label, name in enumerate(names)
        if (own := [place for place, truth in zip(ahead, labels, strict=True) if truth == label])
    }
    figures = {
        f"accuracy@{k}": _interval([float(place < k) for place in ahead], range(len(ahead)), k / len(names))
        for k in ACCURACY_AT
        if k < len(names)
    }
    mean = sum(entry["accuracy"] for entry in per_class.values()) / len(per_class)
    return {"n": len(images), **figures, "mean_per_class": mean, "per_class": per_class}


def retrieval_table(results: Mapping[str, Any]) -> str:
    """Figures in per cent with 95 % intervals."""
    lines = [f"CLIP {results['clip']} ({results['fingerprint']}), {results['embedded']} embedded now"]
    if retrieval := results.get("retrieval"):
        lines.append(
            f"retrieval: {retrieval['num_pictures']} pictures, {retrieval['num_captions']} captions"
            + (f", {retrieval['num_shared']} of them shared by pictures" if retrieval["num_shared"] else "")
        )
        lines += [_line(way.replace("_", " "), retrieval[way]) for way in WAYS]
    if zero_shot := results.get("zero_shot"):
        lines.append(
            f"zero-shot: {zero_shot['n']} pictures, {len(zero_shot['per_class'])} classes, "
            f"{len(zero_shot['templates'])} templates, mean over classes {100 * zero_shot['mean_per_class']:.1f}"
        )
        lines.append(_line("classification", zero_shot))
        worst = sorted(zero_shot["per_class"].items(), key=lambda item: (item[1]["accuracy"], item[0]))[:5]
        listed = [f"{name} {100 * figures['accuracy']:.0f} (n {figures['n']})" for name, figures in worst]
        lines.append("lowest classes    " + ", ".join(listed))
    if results["bad"]:
        first = results["bad"][0]
        lines.append(f"bad rows: {len(results['bad'])}, first {first['file']} row {first['row']}: {first['reason']}")
    return "\n".join(lines)


def retrieval_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """The figures by metric name: `retrieval/image_to_text/recall_at_1`, `zero_shot/accuracy_at_1`."""
    groups = {f"retrieval/{way}": results.get("retrieval", {}).get(way, {}) for way in WAYS}
    groups["zero_shot"] = results.get("zero_shot", {})
    return {
        f"{group}/{name.replace('@', '_at_')}": entry["mean"]
        for group, figures in groups.items()
        for name, entry in figures.items()
        if "@" in name
    }


def _recall(
    queries: Tensor, targets: Tensor, right: Sequence[Sequence[int]], clusters: Sequence[str]
) -> dict[str, Any]:
    ahead = num_ahead(queries, targets, right).tolist()
    num_right = [len(own) for own in right]
    return {
        f"recall@{k}": _interval(
            [float(place < k) for place in ahead], clusters, chance_recall(len(targets), num_right, k)
        )
        for k in RECALL_AT
    }


def _interval(hits: Sequence[float], clusters: Sequence[Any], chance: float) -> dict[str, float]:
    mean, low, high = mean_interval(hits, clusters)
    return {"mean": mean, "low": low, "high": high, "chance": min(chance, 1.0)}


def _line(label: str, figures: Mapping[str, Any]) -> str:
    cells = [
        f"{name} {100 * entry['mean']:.1f} [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}] "
        f"(chance {100 * entry['chance']:.1f})"
        for name, entry in figures.items()
        if "@" in name
    ]
    return f"{label:<16}{'   '.join(cells)}"


def _stack(rows: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(list(rows)))
