"""The card of a set of preference pairs: their origin, counts, drop reasons, lengths and examples. Plain files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from minivlm.schema import PreferencePair

CARD_FILE = "card.md"
NUM_EXAMPLES = 3
"""Examples of each kind, evenly spread over its pairs."""

MAX_EXAMPLE_CHARACTERS = 1500
CUT = (
    " These are whole answers: training reads a wrong one up to the end of its first line that differs from the "
    "chosen one (preferences.cut_rejected)."
)
MANY = 0.9
"""The quantile of lengths that is shown beside mean and median."""


def pairs_card(folder: Path, summary: Mapping[str, Any], pairs: Sequence[PreferencePair]) -> str:
    """Markdown for people who are to train on the pairs.

    Args:
        folder: of the pairs, named in the commands.
        summary: summary.json and reference.json together.
        pairs: those that are trained on.
    """
    kinds = list(dict.fromkeys(pair.kind for pair in pairs))
    parts = [
        "# Preference pairs",
        _origin(summary),
        "## Pairs\n",
        _table(["kind", "pairs", "questions", "chosen: mean, median, 90 %", "rejected: mean, median, 90 %"])
        + "".join(_kind_row(kind, [pair for pair in pairs if pair.kind == kind]) for kind in kinds),
        "Lengths in characters. A large gap between chosen and rejected would teach length instead of truth."
        + (CUT if summary["cut_rejected"] else ""),
        "## Left out\n",
        _reasons(summary),
        *([_unsolved(folder, summary["num_unsolved"])] if summary.get("num_unsolved") else []),
        "## Examples",
        *(part for kind in kinds for part in _examples(kind, [pair for pair in pairs if pair.kind == kind])),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def pairs_metrics(folder: Path) -> dict[str, float]:
    """What summary.json and reference.json of the pairs count, as metrics `preferences/..`."""
    summary, reference = (json.loads((folder / name).read_text()) for name in ("summary.json", "reference.json"))
    counts = {f"preferences/pairs/{kind}": count for kind, count in summary.get("kinds", {}).items()}
    names = ("accuracy", "malformed", "num_unsolved", "mean_chosen_characters", "mean_rejected_characters")
    counts |= {f"preferences/{name}": summary[name] for name in names if name in summary}
    return counts | {"preferences/num_pairs": reference["num_pairs"]}


def _origin(summary: Mapping[str, Any]) -> str:
    reference = f"reference log-probabilities by checkpoint `{summary['reference']}` (`{summary['checkpoint']}`)"
    if summary["source"] == "data.mpo":
        return f"{summary['num_pairs']} pairs of data.mpo, taken over as they are; {reference}."
    return (
        f"{summary['num_samples']} answers to {summary['num_questions']} questions with a known answer, sampled from "
        f"checkpoint `{summary['sampled_by']}`: {100 * summary['accuracy']:.1f} % right, "
        f"{100 * summary['malformed']:.1f} % not in the asked form. {summary['num_open_questions']} open questions, "
        f"answered once with the picture and continued without; {reference}."
    )


def _kind_row(kind: str, pairs: Sequence[PreferencePair]) -> str:
    questions = len({(pair.image_sha256, pair.question) for pair in pairs})
    chosen, rejected = _lengths([pair.chosen for pair in pairs]), _lengths([pair.rejected for pair in pairs])
    return f"| {kind} | {len(pairs)} | {questions} | {chosen} | {rejected} |\n"


def _lengths(texts: Sequence[str]) -> str:
    values = sorted(len(text) for text in texts)
    many = values[min(int(MANY * len(values)), len(values) - 1)]
    return f"{mean(values):.0f}, {median(values):.0f}, {many}"


def _reasons(summary: Mapping[str, Any]) -> str:
    groups = {
        "question": summary.get("prompts_skipped", {}),
        "answer or pair": summary.get("drops", {}),
        "pair, when encoded": summary["dropped"],
    }
    rows = [f"| {what} | {reason} | {n} |\n" for what, found in groups.items() for reason, n in sorted(found.items())]
    return _table(["what", "why", "how many"]) + "".join(rows) if rows else "Nothing."


def _unsolved(folder: Path, count: int) -> str:
    source = f"[{{path: {folder / 'unsolved_meta.json'}, split: train}}]"
    return (
        f"No answer was right for {count} questions. They stand in `{folder / 'unsolved.jsonl'}` for another round "
        f"(docs/preferences.md); list them as\n\n```yaml\ndata:\n  prompts: {source}\n```"
    )


def _examples(kind: str, pairs: Sequence[PreferencePair]) -> list[str]:
    count = min(NUM_EXAMPLES, len(pairs))
    shown = [pairs[place * len(pairs) // count] for place in range(count)]
    parts = [f"### {kind}"]
    for pair in shown:
        truth = f", true answer `{_one_line(pair.answer)}`" if pair.answer is not None else ""
        pictures = ", ".join(f"`{_one_line(image)}`" for image in pair.images) or "no picture"
        parts.append(f"`{_one_line(pair.pair_id)}`: {pictures}{truth}")
        parts += [_quoted(name, getattr(pair, name)) for name in ("question", "chosen", "rejected")]
    return parts


def _one_line(text: str) -> str:
    """Text from outside as it may stand between backticks."""
    return " ".join(text.split()).replace("`", "'")[:200]


def _quoted(name: str, text: str) -> str:
    """A text that somebody or a model wrote, indented: whatever it holds, Markdown shows it as it is."""
    lines = text[:MAX_EXAMPLE_CHARACTERS].splitlines() or [""]
    return f"{name}:\n\n" + "\n".join(f"    {line}" for line in lines)


def _table(names: Sequence[str]) -> str:
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
