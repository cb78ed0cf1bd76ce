"""Strict reports: weights that are read must be those of the model, all of them, in its shapes, and numbers.

transformers fills what it does not find with random values and passes over what it does not know. Called by everything
that reads weights: language models, towers, exports, training state.
"""

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig

SHOWN_NAMES = 3
ROOM_FACTOR = 2
"""How many times what its files hold a model may need: experts and tied weights are stored otherwise than kept."""

PART_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def check_room(
    directory: Path, parts: Collection[PreTrainedConfig], num_layers: int, build: Callable[[], nn.Module]
) -> None:
    """Refuse settings that ask for far more than the folder's safetensors hold, before memory or time is spent on them.

    Args:
        parts: settings whose sizes must be whole numbers from 1.
        num_layers: layers that `build` makes, all parts together; each has a tensor of its own.
        build: makes the model; called on the meta device.

    Raises:
        ValueError: the settings cannot be those of the files.
    """
    for part in parts:
        values = part.to_dict()
        wrong = {name: values[name] for name in PART_SIZES if name in values and not _is_size(values[name])}
        if wrong:
            raise ValueError(f"{part.model_type}: {wrong}: sizes start at 1")
    stored = _stored_sizes(directory)
    if num_layers > len(stored):
        raise ValueError(f"{num_layers} layers, but its files hold {len(stored)} tensors")
    with torch.device("meta"):
        needed = sum(weights.numel() for weights in build().state_dict().values())
    if needed > ROOM_FACTOR * sum(stored):
        raise ValueError(f"a model of {needed:,} numbers, but its files hold {sum(stored):,}")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and value >= 1


def _stored_sizes(directory: Path) -> list[int]:
    """Elements of every tensor in the folder, from the headers alone."""
    sizes: list[int] = []
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (not a dict)
            sizes += [math.prod(shape) for shape in shapes]
    return sizes


def compare_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """What is wrong with weights where those of a model are expected; None if nothing is."""
    shapes, own = ({name: tuple(tensor.shape) for name, tensor in part.items()} for part in (found, expected))
    return compare_shapes(shapes, own)


def compare_shapes(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """As `compare_weights`, of shapes (or sizes) by name."""
    both = expected.keys() & found.keys()
    unlike = [f"{name} {found[name]} instead of {expected[name]}" for name in both if found[name] != expected[name]]
    return _report(len(both), expected.keys() - found.keys(), found.keys() - expected.keys(), unlike, ())


def explain_loading(
    model: nn.Module, info: Mapping[str, Collection[Any]], *, ignored: tuple[str, ...] = ()
) -> str | None:
    """What is wrong with a model that transformers read; None if nothing is.

    Args:
        info: what `from_pretrained(output_loading_info=True, ignore_mismatched_sizes=True)` returns beside the model.
        ignored: beginnings of names that may be left over (the other half of a CLIP, say).
    """
    unlike = {
        str(name): f"{name} {tuple(found)} instead of {tuple(own)}" for name, found, own in info["mismatched_keys"]
    }
    missing = set(info["missing_keys"]) - unlike.keys()
    unexpected = {name for name in info["unexpected_keys"] if not name.startswith(ignored)}
    broken = [name for name, weights in model.named_parameters() if not bool(weights.isfinite().all())]
    return _report(len(model.state_dict()) - len(missing), missing, unexpected, unlike.values(), broken)


def _report(
    num_found: int,
    missing: Collection[str],
    unexpected: Collection[str],
    unlike: Collection[str],
    broken: Collection[str],
) -> str | None:
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": unlike, "not finite": broken}
    if not any(kinds.values()):
        return None
    counts = [f"{num_found - len(unlike)} weights matched"]
    counts += [f"{len(names)} {kind} {sorted(names)[:SHOWN_NAMES]}" for kind, names in kinds.items() if names]
    return ", ".join(counts)
