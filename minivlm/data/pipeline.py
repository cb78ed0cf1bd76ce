"""The data steps on the cluster: validate rows, train the tokenizer, fill the feature cache, tokenize, feed trainers.

Every step is idempotent: its result lies under a name that hashes all that determines it. Jobs call these functions
in the driver; rows and pictures are worked on in Ray Data tasks and actors.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minivlm import layout
from minivlm.config import Config
from minivlm.data.batches import open_table
from minivlm.data.chat import encode_chat
from minivlm.data.draw import REPORT_FILE, draw_stage, drawn_samples, pictures_in_use
from minivlm.data.encode import encode_images
from minivlm.data.encoder import Encoders, Encoding, Tower
from minivlm.data.errors import DataError
from minivlm.data.features import FeatureCache
from minivlm.data.lengths import encode_rows
from minivlm.data.miniworld.write import build_miniworld, expected_rows
from minivlm.data.mixture_table import mixture_lines
from minivlm.data.pictures import PicturePaths
from minivlm.data.readers import list_parts, read_rows
from minivlm.data.samples import LoadedSample, SampleWriter, iter_rows, load_pictures
from minivlm.data.scorer import Wanted
from minivlm.data.scores import clip_scores
from minivlm.data.settings import (
    image_limits,
    num_image_tokens,
    rules,
    scoring,
    source_rules,
    sources,
    stage_rule,
    tokens_dir,
)
from minivlm.data.stream import chain_tasks
from minivlm.data.tokenizer import load_tokenizer, train_tokenizer
from minivlm.data.tokens import TokenTable
from minivlm.data.validate import Rules, Source, check_chunks, read_chunks
from minivlm.log import Progress, get_logger
from minivlm.schema import BadRow
from minivlm.storage import new_directory, write_bytes, write_json

CPUS_PER_READ_TASK = 0.25

_log = get_logger(__name__)


def prepare_samples(config: Config) -> Path:
    """Validate every row of every source; draw the miniworld first where no source is configured.

    Returns:
        Folder with samples.parquet, pairs.parquet, quarantine.jsonl {file, row, reason} and summary.json.

    Raises:
        DataError: a file cannot be read as a whole, a stage has no training rows, or more rows are bad than
            data.max_bad_fraction allows (the quarantine is then kept beside, under `.rejected`).
    """
    folder = layout.samples_dir(config)
    if (folder / "summary.json").exists():
        return folder
    if config.uses_miniworld and not layout.miniworld_dir(config).is_dir():
        with new_directory(layout.miniworld_dir(config)) as drawn:
            build_miniworld(drawn, seed=config.seed, **config.miniworld.model_dump())
    with new_directory(folder) as temporary:
        summary, first_bad = _validate(sources(config), rules(config), temporary)
        _check_summary(config, summary, first_bad, temporary / "quarantine.jsonl")
        write_json(temporary / "summary.json", summary)
    bad = f", {summary['bad']} bad rows in {folder / 'quarantine.jsonl'}" if summary["bad"] else ""
    _log.info("%d rows validated%s", summary["rows"], bad)
    return folder


def prepare_tokenizer(config: Config) -> str:
    """Folder or hub id of the tokenizer; trained on the training conversations if none is configured."""
    path = layout.tokenizer_path(config)
    if config.tokenizer.path or Path(path).is_dir():
        return path
    rows = iter_rows(prepare_samples(config), split="train")
    with new_directory(Path(path)) as temporary:
        texts = (f"{message.role}\n{message.content}" for sample, _, _ in rows for message in sample.messages)
        train_tokenizer(texts, config.tokenizer.vocab_size, temporary)
    return path


def prepare_features(config: Config, tower_path: str, needed: Iterable[str] = ()) -> FeatureCache:
    """Encode the pictures that the tower has not seen yet and print the count: with data.features=cached those of rows
    that stages draw or that are held out; with `stream` only those `needed` (digests about to be read), as training
    encodes its own on the way.
    """
    cache = open_features(config, tower_path)
    asked = list(needed) if config.data.features == "stream" else used_pictures(config)
    encoded = encode_images(asked, cache, encoding(config, tower_path, cache))
    stat = cache.stat()
    _log.log(
        logging.INFO if encoded else logging.DEBUG,
        "features: %d pictures asked for, %d encoded now; %d distinct / %d encoded ever = %.3f",
        len(asked),
        encoded,
        stat.distinct,
        stat.encoded,
        stat.distinct / max(stat.encoded, 1),
    )
    return cache


def used_pictures(config: Config) -> list[str]:
    """Pictures of drawn, val and test rows, in the order of the rows."""
    draws = {stage: draw_rows(config, stage) for stage in drawn_stages(config)}
    in_use = pictures_in_use(prepare_samples(config), draws)
    return [digest for digest in picture_paths(config).digests() if digest in in_use]


def open_features(config: Config, tower_path: str) -> FeatureCache:
    """The cache of this tower, which may be empty."""
    loaded = _tower(config, tower_path).load("cpu")
    return FeatureCache(layout.features_root(config), loaded.fingerprint, (loaded.num_features, loaded.hidden_size))


def encoding(config: Config, tower_path: str, cache: FeatureCache) -> Encoding:
    """What encoder actors need."""
    clip = config.clip
    encoders = Encoders(
        clip.num_encoders, clip.cpus_per_encoder, clip.gpus_per_encoder, config.evaluation.threads_per_actor
    )
    pictures = picture_paths(config).directory
    return Encoding(_tower(config, tower_path), encoders, image_limits(config), pictures, cache.directory)


def picture_paths(config: Config) -> PicturePaths:
    """Where the pictures of the prepared rows lie."""
    folder = prepare_samples(config) / "pictures"
    return PicturePaths(folder) if folder.is_dir() else PicturePaths.write(folder, load_pictures(folder.parent))


def _tower(config: Config, tower_path: str) -> Tower:
    clip = config.clip
    return Tower(tower_path, clip.encode_precision, clip.feature_layer, clip.encode_batch_size)


def draw_rows(config: Config, stage: str) -> Path:
    """Decide which training rows a stage uses, and how often.

    Returns:
        Folder with copies.npy and mixture.json.

    Raises:
        DataError: settings leave no row of a source or of the stage.
    """
    folder = layout.draw_dir(config, stage)
    if not (folder / REPORT_FILE).exists():
        samples = prepare_samples(config)
        scores = _clip_scores(config, stage, samples)
        given = source_rules(config, stage)
        report = draw_stage(samples, folder, stage, given, stage_rule(config, stage), scores)
        drawn, rows = (sum(source[key] for source in report["sources"]) for key in ("drawn", "train"))
        if not rows == drawn == report["draws"]:
            _log.info("%s: %d draws of %d of %d rows, see %s", stage, report["draws"], drawn, rows, folder)
    return folder


def _clip_scores(config: Config, stage: str, samples: Path) -> np.ndarray | None:
    """CLIP scores of the rows of sources with a threshold; None where there is none."""
    rules = source_rules(config, stage)
    places = tuple(place for place, rule in enumerate(rules) if rule.min_clip_score is not None)
    file = samples / ("pairs.parquet" if stage == "mpo" else "samples.parquet")
    return clip_scores(Wanted(file, stage, places), scoring(config, prepare_tokenizer(config))) if places else None


def iter_training_rows(config: Config, stage: str, *, once: bool = False) -> Iterator[LoadedSample]:
    """What `draw_rows` drew, in file order. `once`: each row one time, repeats left out."""
    return drawn_samples(prepare_samples(config), draw_rows(config, stage), source_rules(config, stage), once=once)


def mixture_tables(config: Config) -> list[str]:
    """What each stage drew, as lines for people; only draws that were made."""
    files = [layout.draw_dir(config, stage) / REPORT_FILE for stage in drawn_stages(config)]
    return [line for file in files if file.exists() for line in ["", *mixture_lines(json.loads(file.read_text()))]]


def drawn_stages(config: Config) -> list[str]:
    """Stages that have rows of their own."""
    return [stage for stage in ("pretrain", "sft", "prompts", "mpo") if source_rules(config, stage)]


def build_tokens(config: Config, stage: str, split: str) -> Path:
    """Token table of one stage and split. Rows longer than model.max_length_tokens go to SPLIT.quarantine.jsonl.

    Raises:
        DataError: more rows are too long than data.max_bad_fraction allows, or as `draw_rows`.
    """
    folder = tokens_dir(config, stage) / split
    if not (folder / "meta.json").exists():
        tokenizer = load_tokenizer(prepare_tokenizer(config))
        rows = (
            iter_training_rows(config, stage)
            if split == "train"
            else iter_rows(prepare_samples(config), stage=stage, split=split)
        )
        encoded = encode_rows(
            rows,
            partial(encode_chat, tokenizer, num_image_tokens=num_image_tokens(config)),
            max_length=config.model.max_length_tokens,
            max_bad_fraction=config.data.max_bad_fraction,
            quarantine=folder.with_name(f"{folder.name}.quarantine.jsonl"),
        )
        TokenTable.write(folder, encoded)
    return folder


def count_rows(config: Config) -> dict[str, int]:
    """Training rows per stage without a cluster: drawn ones, else validated ones, else what the files or the drawing
    of the miniworld will hold."""
    summary = layout.samples_dir(config) / "summary.json"
    if summary.exists():
        counts = json.loads(summary.read_text())["counts"]
        rows = {key.removesuffix("/train"): count for key, count in counts.items() if key.endswith("/train")}
        reports = {stage: layout.draw_dir(config, stage) / REPORT_FILE for stage in rows}
        return rows | {stage: json.loads(path.read_text())["draws"] for stage, path in reports.items() if path.exists()}
    if config.uses_miniworld:
        world = config.miniworld
        return expected_rows(
            world.train_scenes,
            world.change_scenes,
            world.reasoning_scenes,
            world.prompt_scenes,
            world.questions_per_scene,
            world.direct_reasoning_fraction,
        )
    listed: Counter[str] = Counter()
    for source in sources(config):
        listed[source.stage] += sum(1 for _ in read_rows(Path(source.path)))
    return dict(listed)


def load_token_counts(config: Config) -> dict[str, int]:
    """Training tokens per stage, where the tables exist; needs no cluster."""
    if config.clip.path and not Path(config.clip.path).is_dir():
        return {}
    paths = {stage: tokens_dir(config, stage) / "train" for stage in ("pretrain", "sft")}
    return {stage: int(open_table(str(path)).lengths.sum()) for stage, path in paths.items() if path.is_dir()}


def _validate(given: list[Source], kept_to: Rules, folder: Path) -> tuple[dict[str, Any], BadRow | None]:
    parts = [(part, source, kept_to) for source in given for part in list_parts(Path(source.path))]
    counts: Counter[str] = Counter()
    by_source: dict[str, Counter[str]] = {}
    total, bad, first_bad = 0, 0, None
    with SampleWriter(folder) as writer, Progress(len(parts), "validate files") as progress:
        checks = chain_tasks(parts, read_chunks, CPUS_PER_READ_TASK, check_chunks, 1.0) if parts else None
        for row in checks.iter_rows() if checks else ():
            checked = json.loads(row["checked"])
            if "error" in checked:
                raise DataError(checked["error"])
            bad_rows = [BadRow(**item) for item in checked["bad"]]
            writer.add(checked["samples"], checked["pairs"], bad_rows)
            counts.update(f"{sample['stage']}/{sample['split']}" for sample in checked["samples"])
            counts["mpo/train"] += len(checked["pairs"])
            held_out = sum(sample["split"] != "train" for sample in checked["samples"])
            found = Counter(rows=checked["rows"], bad=len(bad_rows), held_out=held_out)
            by_source.setdefault(checked["source"], Counter()).update(found)
            total += checked["rows"]
            bad += len(bad_rows)
            first_bad = first_bad or next(iter(bad_rows), None)
            progress.update(int(checked["is_last"]), rows=total)
    found_rows = {key: counts[key] for key in sorted(counts) if counts[key]}
    return {"rows": total, "bad": bad, "counts": found_rows, "sources": by_source}, first_bad


def _check_summary(config: Config, summary: dict[str, Any], first_bad: BadRow | None, quarantine: Path) -> None:
    rows, bad, limit = summary["rows"], summary["bad"], config.data.max_bad_fraction
    if first_bad and bad > limit * rows:
        folder = layout.samples_dir(config)
        kept = folder.with_name(f"{folder.name}.rejected") / quarantine.name
        write_bytes(kept, quarantine.read_bytes())
        raise DataError(
            f"{bad} of {rows} rows are bad, more than data.max_bad_fraction={limit:g} allows. First: {first_bad.file}, "
            f"row {first_bad.row}: {first_bad.reason}. All of them: {kept}. Correct the files, or accept the loss by "
            f"data.max_bad_fraction={bad / rows + 0.005:.2f}"
        )
    for stage in {source.stage for source in sources(config)} - {"prompts"}:
        if not summary["counts"].get(f"{stage}/train"):
            raise DataError(
                f"data.{stage} has no training row: {bad} of {rows} rows are bad, the others belong to val or test. "
                f"Type `split: train` for a source of data.{stage}"
            )
