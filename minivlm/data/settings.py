"""What the data steps take from the configuration tree, as plain arguments. No cluster."""

from pathlib import Path

from transformers import AutoConfig, CLIPConfig

from minivlm import layout
from minivlm.config import Config
from minivlm.data.catalog import find_files
from minivlm.data.images import ImageLimits
from minivlm.data.miniworld.write import FILES as MINIWORLD
from minivlm.data.validate import Rules, Source
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
        for given in getattr(config.data, stage):
            for file in find_files(given.path, given.image_root, given.subset):
                own = (tuple(file.columns.items()), file.repeat)
                found.append(Source(str(file.path), str(file.image_root), stage, given.split, given.task, *own))
    return found


def rules(config: Config) -> Rules:
    """What rows must keep to."""
    data = config.data
    return Rules(image_limits(config), data.val_fraction, data.test_fraction, str(layout.pictures_dir(config)))


def image_limits(config: Config) -> ImageLimits:
    """Caps on pictures."""
    data = config.data
    return ImageLimits(data.max_image_bytes, data.max_image_pixels, data.max_image_side_px, data.max_aspect_ratio)


def num_image_tokens(config: Config) -> int:
    """Tokens of one picture: patches and the class token."""
    if config.clip.path is None:
        return (config.clip.image_size_px // config.clip.patch_size_px) ** 2 + 1
    settings = AutoConfig.from_pretrained(config.clip.path)
    vision = settings.vision_config if isinstance(settings, CLIPConfig) else settings
    return int((vision.image_size // vision.patch_size) ** 2 + 1)


def tokens_dir(config: Config) -> Path:
    """Parent of the token tables; its name hashes what they depend on besides the rows."""
    key = [layout.tokenizer_path(config), num_image_tokens(config), config.model.max_length_tokens]
    return layout.samples_dir(config) / f"tokens-{content_hash(key)}"
