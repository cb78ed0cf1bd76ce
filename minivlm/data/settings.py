"""What the data steps take from the configuration tree, as plain arguments. No cluster."""

from pathlib import Path

from minivlm import layout
from minivlm.config import Config
from minivlm.data.catalog import find_files
from minivlm.data.images import ImageLimits
from minivlm.data.miniworld.write import FILES as MINIWORLD
from minivlm.data.mixture import SourceRule, StageRule
from minivlm.data.scorer import Scoring
from minivlm.data.validate import Rules, Source
from minivlm.data.video import VideoRules
from minivlm.model.image_tokens import CLASS_TOKENS, count_features, count_image_tokens, read_tower_config
from minivlm.storage import content_hash


def sources(config: Config) -> list[Source]:
    """Every annotation file with absolute paths; the drawn ones where none is configured.

    Raises:
        DataError: a source that is not there.
    """
    if config.uses_miniworld:
        folder = layout.miniworld_dir(config)
        return [Source(str(folder / f"{stage}.json"), str(folder), stage, "auto", "caption") for stage in MINIWORLD]
    found = []
    for stage in ("pretrain", "sft", "prompts", "mpo"):
        for place, given in enumerate(getattr(config.data, stage)):
            for file in find_files(given.path, given.image_root, given.subset):
                own = (tuple(file.columns.items()), file.repeat, place, tuple(sorted(given.min_rating)))
                found.append(Source(str(file.path), str(file.image_root), stage, given.split, given.task, *own))
    return found


def rules(config: Config) -> Rules:
    """What rows must keep to."""
    data = config.data
    with_keys, with_signatures = data.mixture.finds_by
    return Rules(
        limits=image_limits(config),
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        pictures_dir=str(layout.pictures_dir(config)),
        video=video_rules(config),
        turns=data.turns,
        with_keys=with_keys,
        with_signatures=with_signatures,
    )


def source_rules(config: Config, stage: str) -> list[SourceRule]:
    """How rows are drawn from each source of a stage."""
    if config.uses_miniworld:
        if stage not in MINIWORLD:
            return []
        return [SourceRule(name="miniworld", path=str(layout.miniworld_dir(config) / f"{stage}.json"))]
    return [
        SourceRule(
            name=f"data.{stage}.{place}",
            path=given.path,
            weight=given.weight,
            max_rows=given.max_rows,
            repeat=given.repeat,
            min_rating=tuple(sorted(given.min_rating.items())),
            min_clip_score=given.min_clip_score,
        )
        for place, given in enumerate(getattr(config.data, stage))
    ]


def stage_rule(config: Config, stage: str) -> StageRule:
    """How a stage balances what its sources give, and which duplicates it drops."""
    return StageRule(**getattr(config.data.mixture, stage).model_dump())


def scoring(config: Config, tokenizer_path: str) -> Scoring:
    """The CLIP that scores rows; `tokenizer_path` is the one of a CLIP trained here."""
    clip = config.clip
    return Scoring(
        path=layout.tower_path(config),
        tokenizer_path=tokenizer_path if clip.path is None else None,
        precision=clip.encode_precision,
        batch_size=clip.encode_batch_size,
        num_actors=clip.num_encoders,
        cpus=clip.cpus_per_encoder,
        gpus=clip.gpus_per_encoder,
        threads=config.evaluation.threads_per_actor,
        store=layout.scores_root(config),
        limits=image_limits(config),
    )


def image_limits(config: Config) -> ImageLimits:
    """Caps on pictures."""
    data = config.data
    return ImageLimits(data.max_image_bytes, data.max_image_pixels, data.max_image_side_px, data.max_aspect_ratio)


def video_rules(config: Config) -> VideoRules:
    """What is taken of videos, and caps on them."""
    data = config.data
    return VideoRules(
        num_frames=data.video_frames,
        rule=data.video_rule,
        side_px=data.video_side_px,
        max_bytes=data.max_video_bytes,
        max_seconds=data.max_video_s,
        max_frames=data.max_video_frames,
        max_decode_s=data.max_video_decode_s,
    )


def tower_shape(config: Config, *, local_files_only: bool = False) -> tuple[int, int]:
    """(P, D): features of one picture and their width, from the settings of the tower alone.

    Args:
        local_files_only: of a hub id, look in the cache only.

    Raises:
        ValueError: clip.path holds no tower that we run.
    """
    if config.clip.path is None:
        patches = config.clip.image_size_px // config.clip.patch_size_px
        return patches**2 + CLASS_TOKENS["clip_vision_model"], config.clip.vision_hidden_size
    vision = read_tower_config(config.clip.path, local_files_only=local_files_only)
    return count_features(vision), int(vision.hidden_size)


def num_image_tokens(config: Config) -> int:
    """Tokens of one picture behind the projector."""
    return count_image_tokens(config.model.projector, tower_shape(config)[0], config.model.projector_sizes)


def tokens_dir(config: Config, stage: str) -> Path:
    """Parent of a stage's token tables; its name hashes what they depend on besides the drawn rows."""
    key = [layout.tokenizer_path(config), num_image_tokens(config), config.model.max_length_tokens]
    return layout.stage_rows_dir(config, stage) / f"tokens-{content_hash(key)}"
