"""Strict reports: weights that are read must be those of the model, all of them, in its shapes, and numbers.

transformers fills what it does not find with random values and passes over what it does not know. Called by everything
that reads weights: language models, towers, exports, training state.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

SHOWN_NAMES = 3


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
