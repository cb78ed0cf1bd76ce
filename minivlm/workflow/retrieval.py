"""Retrieval and zero-shot classification with a CLIP: what is compared, the figures, and where they are kept.

Pictures and texts are embedded once per content and CLIP; the figures are computed again from that, so a repeated
command costs no forward pass. Called by the retrieval job.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minivlm import layout
from minivlm.config import Config, ConfigError
from minivlm.data.captions import CaptionSet, ClassSet, read_captions, read_classes, row_captions
from minivlm.data.embeddings import embed
from minivlm.data.errors import DataError
from minivlm.data.miniworld.classes import TEMPLATES, draw_classes
from minivlm.data.pipeline import prepare_samples
from minivlm.data.samples import load_samples
from minivlm.data.settings import scoring
from minivlm.evaluation.retrieval import retrieval_figures, retrieval_metrics, retrieval_table, zero_shot_figures
from minivlm.log import get_logger
from minivlm.schema import BadRow
from minivlm.storage import content_hash, file_sha256, new_directory, write_json
from minivlm.tracking.client import check_tracking
from minivlm.tracking.runs import start_run
from minivlm.workflow.steps import prepare_tower

DEFAULT_TEMPLATE = "a photo of a {}."
"""CLIP's own for pictures of things."""

PICTURES_PER_CLASS = 12
"""Of the classes that are drawn where the embedded data set is used."""

log = get_logger(__name__)


@dataclass(frozen=True)
class Asked:
    """What to compare. Without a captions file the test rows' captions, without classes those of the miniworld."""

    captions: Path | None = None
    image_root: Path | None = None
    classes: Path | None = None
    templates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """Figures as a table for people, and the JSON file that holds them."""

    table: str
    path: Path


def measure(config: Config, asked: Asked) -> Measured:
    """Embed, compare and keep: `retrieval/HASH/results.json` under storage_path, and an MLflow run.

    Raises:
        ConfigError, DataError, ValueError: nothing to compare, too many bad rows, or no CLIP with a text side.
    """
    _check_asked(asked)
    check_tracking(config)
    tower = config.clip.path or prepare_tower(config)
    given = replace(scoring(config, layout.tokenizer_path(config)), store=layout.embeddings_root(config))
    fingerprint = given.load("cpu").fingerprint
    captions, classes = _sets(config, asked)
    templates = _templates(config, asked)
    digests = {path: file_sha256(path) for path in [*captions.pictures, *classes.pictures]}
    prompts = [[template.format(name) for template in templates] for name in classes.names]
    wanted = {_key(text): text for row in [*captions.captions, *prompts] for text in row}
    found = embed({digest: str(path) for path, digest in digests.items()}, wanted, given, fingerprint)
    unread = [BadRow(str(path), 0, found.errors[key]) for path, key in digests.items() if key in found.errors]
    results: dict[str, Any] = {"clip": tower, "fingerprint": fingerprint, "embedded": found.computed}
    texts = {text: found.texts[key] for key, text in wanted.items()}
    merged: dict[str, list[str]] = {}
    for path, own in zip(captions.pictures, captions.captions, strict=True):
        if digests[path] in found.images:
            merged.setdefault(digests[path], []).extend(own)
    if merged:
        results["retrieval"] = retrieval_figures(merged, found.images, texts)
    labels, twice = _distinct(classes, digests)
    shown = [digest for digest in labels if digest in found.images]
    if shown:
        rows = [[texts[prompt] for prompt in row] for row in prompts]
        images = [found.images[digest] for digest in shown]
        figures = zero_shot_figures(classes.names, rows, images, [labels[digest] for digest in shown])
        results["zero_shot"] = figures | {"templates": list(templates)}
    bad = [*captions.bad, *classes.bad, *twice, *unread]
    _check_bad(bad, len(digests) + len(captions.bad) + len(classes.bad), config.data.max_bad_fraction)
    results["bad"] = [asdict(row) for row in bad]
    name = content_hash([fingerprint, sorted(digests.values()), sorted(wanted), list(templates)])
    path = layout.retrieval_root(config) / name / "results.json"
    write_json(path, results)
    with start_run(config, "retrieval", key=name) as run:
        run.log_metrics(retrieval_metrics(results))
        run.log_artifact(path)
    return Measured(retrieval_table(results), path)


def describe(config: Config, asked: Asked) -> str:
    """The dry run: what would be compared and where it would be computed. Reads the files, writes nothing."""
    _check_asked(asked)
    clip, root = config.clip, layout.tower_path(config)
    trained = "" if clip.path else " (trained here)" if Path(root).is_dir() else " (to be trained here first)"
    lines = [f"CLIP        {root}{trained}"]
    if asked.captions:
        captions = read_captions(asked.captions, asked.image_root or asked.captions.parent)
        count = sum(len(texts) for texts in captions.captions)
        lines.append(f"retrieval   {len(captions.pictures)} pictures, {count} captions, {len(captions.bad)} bad rows")
    elif _uses_rows(asked):
        lines.append("retrieval   captions of the test split")
    if asked.classes:
        classes = read_classes(asked.classes)
        templates = _templates(config, asked)
        names = f"{len(classes.names)} classes ({', '.join(classes.names[:4])}, ..)"
        used = f"{len(templates)} templates ({templates[0]!r})"
        lines.append(f"zero-shot   {len(classes.pictures)} pictures, {names}, {used}")
    elif _uses_rows(asked) and config.uses_miniworld:
        lines.append("zero-shot   drawn pictures of one shape, 16 classes of colour and form, 18 templates")
    lines.append(
        f"embedding   {clip.num_encoders} actors of {clip.cpus_per_encoder:g} CPUs and {clip.gpus_per_encoder:g} GPUs, "
        f"{clip.encode_batch_size} at a time, {clip.encode_precision}; kept in {layout.embeddings_root(config)}"
    )
    return "\n".join(lines)


def _check_asked(asked: Asked) -> None:
    """Refuse options that nothing would read."""
    if asked.image_root and not asked.captions:
        raise ConfigError("--image-root is of a captions file: add --captions FILE, or leave it out")
    if asked.templates and asked.captions and not asked.classes:
        raise ConfigError("--template is of classes: add --classes FOLDER, or leave it out")


def _uses_rows(asked: Asked) -> bool:
    """Whether nothing was named, so that the data set of the configuration is compared."""
    return asked.captions is None and asked.classes is None


def _sets(config: Config, asked: Asked) -> tuple[CaptionSet, ClassSet]:
    """What was asked for; the other one is empty."""
    captions, classes = CaptionSet((), ()), ClassSet((), (), ())
    if asked.captions:
        captions = read_captions(asked.captions, asked.image_root or asked.captions.parent)
    elif _uses_rows(asked):
        captions = row_captions(load_samples(prepare_samples(config), stage="pretrain", split="test"))
        if not captions.pictures:
            raise DataError(
                "No captioned picture in the test split of data.pretrain. Raise data.test_fraction, or type "
                "--captions FILE"
            )
    if asked.classes:
        classes = read_classes(asked.classes)
    elif _uses_rows(asked) and config.uses_miniworld:
        folder = layout.classes_dir(config)
        if not folder.is_dir():
            with new_directory(folder) as place:
                draw_classes(
                    place,
                    seed=config.seed,
                    per_class=PICTURES_PER_CLASS,
                    image_size_px=config.miniworld.image_size_px,
                )
        classes = read_classes(folder)
    return captions, classes


def _templates(config: Config, asked: Asked) -> tuple[str, ...]:
    """Templates, each with one `{}` for the class name.

    Raises:
        ConfigError: one without.
    """
    for template in asked.templates:
        rest = template.replace("{}", "", 1)
        if rest == template or {"{", "}"} & set(rest):
            raise ConfigError(f"--template {template!r} must hold {{}} once, for the class: 'a photo of a {{}}.'")
    own = TEMPLATES if _uses_rows(asked) and config.uses_miniworld else (DEFAULT_TEMPLATE,)
    return asked.templates or own


def _distinct(classes: ClassSet, digests: Mapping[Path, str]) -> tuple[dict[str, int], list[BadRow]]:
    """Class of each distinct picture, and pictures that are there twice."""
    labels: dict[str, int] = {}
    twice = []
    for path, label in zip(classes.pictures, classes.labels, strict=True):
        if digests[path] in labels:
            reason = f"the same picture as one of class `{classes.names[labels[digests[path]]]}`"
            twice.append(BadRow(str(path), 0, reason))
        else:
            labels[digests[path]] = label
    return labels, twice


def _check_bad(bad: Sequence[BadRow], total: int, limit: float) -> None:
    if not bad:
        return
    first = f"{bad[0].file} row {bad[0].row}: {bad[0].reason}"
    if len(bad) > limit * total:
        raise DataError(
            f"{len(bad)} of {total} rows are bad, more than data.max_bad_fraction={limit:g} allows. First: {first}"
        )
    log.warning("%d of %d rows are left out, first %s", len(bad), total, first)


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
