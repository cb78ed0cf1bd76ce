"""The four gates between a registered version and `@champion`, each a check with the figure that it measured.

    complete   every file is what its manifest says; tokenizer, processor, settings and provenance are there
    finite     weights, metrics and scores are numbers
    reloads    the stored files give the logits of the export that they were stored from
    better     more right than the champion on the same questions, beyond the noise

`workflow.register` calls `examine` with a downloaded version. No registry here.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minivlm.data.chat import encode_prompt
from minivlm.inference.verify import TOLERANCE
from minivlm.model.checkpoint import CheckpointError
from minivlm.model.export import Export, load_export, load_export_tower
from minivlm.schema import IMAGE_PLACEHOLDER, Message
from minivlm.scoring.scorers import CAPTION_SCORERS, CAPTION_TOKENS
from minivlm.scoring.statistics import paired_macro_difference
from minivlm.tracking.manifest import check_manifest

GATES = ("complete", "finite", "reloads", "better")
QUESTIONS = ("What is in the picture?", "图中有什么？ 3, 2, 1")
"""Asked of stored and exported weights, each about a picture of its own."""

STORE_AGAIN = "Type the same command again: its files are then stored anew"
MORE = "(evaluation.max_questions_per_task=null, data.test_fraction)"
ADD = f"Add pictures to the test {MORE}, or train further"
TRAIN_FURTHER = f"Train further, or ask more test questions {MORE}"

LEVEL = 0.05
FEWEST = 6
"""Pictures that must differ: by the sign test 5 that all speak for one side still have p = 2 / 2^5 > LEVEL."""

EXCHANGES = 10_000
ROUNDING = 1e-9
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Check:
    """What one gate found. `passed` is None where an earlier gate left nothing to look at; `advice`: what to type."""

    gate: str
    passed: bool | None
    measured: str
    advice: str = ""


def examine(folder: Path, digest: str, export_dir: Path, metrics: Mapping[str, float], rows: Rows) -> list[Check]:
    """The gates that need no champion.

    Args:
        folder: the version as downloaded.
        digest: under which it was registered.
        export_dir: what it was stored from.
        metrics, rows: figures and answers of its evaluation.
    """
    checks = [check_complete(folder, digest)]
    if checks[-1].passed:
        checks.append(check_finite(folder, metrics, rows))
    if checks[-1].passed:
        checks.append(check_reloads(folder, export_dir))
    return checks + [Check(gate, None, "not looked at") for gate in GATES[len(checks) : -1]]


def check_complete(folder: Path, digest: str) -> Check:
    """Files, tokenizer, processor, settings and provenance, against the manifest."""
    try:
        provenance = check_manifest(folder, digest)
    except ValueError as error:
        return Check("complete", False, str(error), STORE_AGAIN)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    origin = f"commit {provenance['git_commit'][:12]}, source {provenance['source']}, data {provenance['data']}"
    return Check("complete", True, f"{size:.1f} MiB equal to their sha256, {_vocabulary(folder)}; {origin}")


def check_finite(folder: Path, metrics: Mapping[str, float], rows: Rows) -> Check:
    """Every number of the weights, the metrics and the scores."""
    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    weights = file.get_tensor(name)
                    count += weights.numel()
                    if bad := weights.numel() - int(torch.isfinite(weights).sum()):
                        return _not_finite(f"{bad:,} of {weights.numel():,} numbers of {name} are not finite")
        except SafetensorError as error:
            return _not_finite(f"{path.name} cannot be read ({error})")
    figures = {**metrics, **{f"score of {row['task']} {row['question_id']}": row["score"] for row in rows}}
    bad_figures = [f"{name} is {value}" for name, value in figures.items() if not math.isfinite(value)]
    if bad_figures:
        return _not_finite(bad_figures[0])
    return Check("finite", True, f"{count:,} weights, {len(metrics)} metrics, {len(rows)} scores")


def check_reloads(folder: Path, export_dir: Path) -> Check:
    """Logits of the stored files and of the export, on the same questions."""
    try:
        stored, exported = _probe(folder), _probe(export_dir)
    except CheckpointError as error:
        return Check("reloads", False, str(error), "Train the stage again, or export with the tokenizer it had")
    unlike = [
        number for number, (ours, theirs) in enumerate(zip(stored, exported, strict=True)) if ours[0] != theirs[0]
    ]
    if unlike:
        measured = f"a question is {len(stored[unlike[0]][0])} tokens as stored, {len(exported[unlike[0]][0])} in"
        return Check(
            "reloads", False, f"{measured} {export_dir}: another tokenizer or other picture tokens", STORE_AGAIN
        )
    largest = max(float((ours[1] - theirs[1]).abs().max()) for ours, theirs in zip(stored, exported, strict=True))
    measured = f"largest difference of a logit {largest:.2g} over {sum(len(ids) for ids, _ in stored)} tokens"
    if not largest <= TOLERANCE:
        return Check("reloads", False, f"{measured} to {export_dir}", STORE_AGAIN)
    return Check("reloads", True, measured)


def check_better(rows: Rows, champion_rows: Rows, champion: int, vocabularies: tuple[str, str]) -> Check:
    """Paired comparison on the same questions, macro over tasks: more right, beyond the noise.

    Beyond the noise: the 95 % interval clustered by picture lies above 0, and exchanging the two on pictures at random
    seldom gives as much (`exchange_p_value`), which holds for few pictures too, where the interval does not. A task
    about one picture has no spread and is left out. Captions count only where they are all there is, as in the metric.

    Args:
        rows, champion_rows: answers of the candidate and of the champion.
        champion: its version.
        vocabularies: sha256 of the tokenizers of the two. Captions of the test split are scored by tokens, which only
            the same tokenizer makes comparable.
    """
    ours, theirs = _by_question(rows), _by_question(champion_rows)
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())[0]
        return Check(
            "better",
            False,
            f"{len(ours.keys() & theirs.keys())} of {len(ours)} questions were asked of champion {champion} too; "
            f"{odd[0]} {f'{odd[1]} {odd[2]}'.strip()} was asked of one alone",
            "Evaluate both with the same data and evaluation settings",
        )
    asked = {key: row for key, row in ours.items() if row["scorer"] not in CAPTION_SCORERS} or ours
    by_tokens = any(row["scorer"] == CAPTION_TOKENS for row in asked.values())
    if by_tokens and vocabularies[0] != vocabularies[1]:
        return Check(
            "better",
            False,
            f"its tokenizer {vocabularies[0][:12]} is not that of champion {champion} ({vocabularies[1][:12]}), and "
            "captions are scored by tokens",
            "Add questions with short answers to data.sft",
        )
    scores: defaultdict[str, list[float]] = defaultdict(list)
    baseline: defaultdict[str, list[float]] = defaultdict(list)
    clusters: defaultdict[str, list[str]] = defaultdict(list)
    for key, row in asked.items():
        scores[key[0]].append(float(row["score"]))
        baseline[key[0]].append(float(theirs[key]["score"]))
        clusters[key[0]].append(row["cluster"])
    single = sorted(task for task, pictures in clusters.items() if len(set(pictures)) < 2)
    for task in single:
        del scores[task], baseline[task], clusters[task]
    if not scores:
        return Check("better", False, f"{len(asked)} questions, of each task about one picture, tell nothing", ADD)
    check = _compare(scores, baseline, clusters, champion)
    left_out = f"; left out, as about one picture: {', '.join(single)}" if single else ""
    return replace(check, measured=check.measured + left_out)


def _compare(
    scores: Mapping[str, Sequence[float]],
    baseline: Mapping[str, Sequence[float]],
    clusters: Mapping[str, Sequence[str]],
    champion: int,
) -> Check:
    found = paired_macro_difference(scores, baseline, clusters)
    totals: defaultdict[str, float] = defaultdict(float)
    for task, values in scores.items():
        for value, other, picture in zip(values, baseline[task], clusters[task], strict=True):
            totals[picture] += (value - other) / (len(scores) * len(values))
    differing = sum(abs(total) > ROUNDING for total in totals.values())
    measured = f"{100 * found.difference:+.2f} points on champion {champion}"
    if differing < FEWEST or found.low is None or found.high is None or found.p_value is None:
        measured += f", by {differing} of {found.num_clusters} pictures: fewer than {FEWEST} show nothing"
        return Check("better", False, measured, ADD)
    by_chance = exchange_p_value(list(totals.values()))
    measured += (
        f", 95 % interval {100 * found.low:+.2f} to {100 * found.high:+.2f}, p = {max(found.p_value, 1e-9):.2g} (by "
        f"exchange {by_chance:.2g}), {found.n} questions about {found.num_clusters} pictures, {differing} differ"
    )  # a smaller p is rounding
    if found.low > 0 and by_chance <= LEVEL:
        return Check("better", True, measured)
    verdict = "worse beyond the noise" if found.high < 0 and by_chance <= LEVEL else "not beyond the noise"
    smallest = f". Such a set shows {100 * found.minimum_difference:.2f} points" if found.minimum_difference else ""
    return Check("better", False, f"{measured}: {verdict}{smallest}", TRAIN_FURTHER)


def exchange_p_value(totals: Sequence[float]) -> float:
    """How often the sum would be as far from 0 if, on each picture, the two models were exchanged by a coin.

    If they are equally good, all exchanges are equally likely, whatever the spread; so a few pictures with much weight
    cannot pass for many. With n equal totals it is the sign test: 2 / 2^n. Fisher 1935, The Design of Experiments, 21.

    Args:
        totals: each picture's share of the difference.

    Returns:
        Two-sided p-value, from EXCHANGES seeded draws.
    """
    random = np.random.default_rng(0)
    sums = np.zeros(EXCHANGES)
    sizes, counts = np.unique(np.round(np.abs(totals), 12), return_counts=True)
    for size, count in zip(sizes, counts, strict=True):
        if size > 0:
            sums += size * (2 * random.binomial(count, 0.5, EXCHANGES) - count)
    as_far = int(np.count_nonzero(np.abs(sums) >= abs(sum(totals)) - ROUNDING))
    return (1 + as_far) / (1 + EXCHANGES)


def _not_finite(measured: str) -> Check:
    return Check("finite", False, measured, "Train again from an earlier checkpoint, with a lower learning rate")


def _by_question(rows: Rows) -> dict[tuple[str, ...], Mapping[str, Any]]:
    """Rows by what makes them one question: users' files may give one id to several, beside the task and the source."""
    names = ("task", "source", "question_id", "cluster", "question")
    return {tuple(str(row[name]) for name in names): row for row in rows}


def _vocabulary(folder: Path) -> str:
    try:
        settings = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return f"a tokenizer of {len(settings['model']['vocab'])} entries"
    except (OSError, ValueError, KeyError, TypeError):
        return "a tokenizer of unknown size"  # gate `reloads` refuses what cannot be read


@torch.inference_mode()
def _probe(folder: Path) -> list[tuple[list[int], Tensor]]:
    """Token ids and logits [T, V] of QUESTIONS, from the folder and nothing else."""
    try:
        export, tower = load_export(folder), load_export_tower(folder, batch_size=len(QUESTIONS))
    except ValueError as error:
        raise CheckpointError(f"{folder.name}: {error}") from None
    _check_vocabulary(export, folder)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (48, 64, 3), generator=generator, dtype=torch.uint8)
    pictures = [Image.fromarray(noise.numpy()), Image.new("RGB", (64, 48), (200, 30, 30))]
    features = tower.encode(tower.preprocess(pictures))
    found = []
    for question, feature in zip(QUESTIONS, features, strict=True):
        turn = Message("user", f"{IMAGE_PLACEHOLDER}\n{question}")
        ids = encode_prompt(export.tokenizer, [turn], export.num_image_tokens, num_images=1)
        embeds = export.vlm.embed(torch.tensor([ids]), feature[None], torch.tensor([0]))
        found.append((ids, torch.as_tensor(export.vlm.language_model(inputs_embeds=embeds).logits)[0]))
    return found


def _check_vocabulary(export: Export, folder: Path) -> None:
    rows, entries = export.vlm.language_model.get_input_embeddings().weight.shape[0], len(export.tokenizer)
    if entries > rows:
        raise CheckpointError(
            f"{folder.name}: its tokenizer has {entries} entries for {rows} embeddings: it is of another checkpoint"
        )
    if (found := export.tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)) != export.image_token_id:
        raise CheckpointError(
            f"{folder.name}: its tokenizer has {IMAGE_PLACEHOLDER} at {found}, its config.json at "
            f"{export.image_token_id}: it is of another checkpoint"
        )
