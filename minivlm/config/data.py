"""Settings of the data: sources, limits on pictures, the embedded miniworld, the tokenizer."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from minivlm.config.base import Frozen


class SourceConfig(Frozen):
    """Rows that the user brings, in any format that docs/data.md lists."""

    path: str
    """A file (.json, .jsonl, .parquet, .tar), a folder or a pattern of them, MMPR's meta.json, LLaMA-Factory's
    dataset_info.json, or `hf://datasets/OWNER/NAME[@REVISION]`."""

    subset: str | None = None
    """Entry of a catalogue (default: all), or folder of a hub data set."""

    image_root: Path | None = None
    """Folder that the rows' picture names are relative to. Default: the folder of each file."""

    split: Literal["train", "val", "test", "auto"] = "auto"
    """What the rows are for. `auto` splits by picture with data.val_fraction and data.test_fraction. Pairs of data.mpo
    all train: leave out those about pictures that you hold out."""

    task: str = "caption"
    """Task name of rows that carry none."""


class DataConfig(Frozen):
    """What is trained on. With no source at all, the embedded miniworld is drawn."""

    pretrain: tuple[SourceConfig, ...] = ()
    """Image-caption pairs of the first stage."""

    sft: tuple[SourceConfig, ...] = ()
    """Instruction answers of the second stage; their val and test rows are also the evaluation questions."""

    prompts: tuple[SourceConfig, ...] = ()
    """Questions with an `answer`, for preference sampling. Default: the SFT training rows that have one."""

    mpo: tuple[SourceConfig, ...] = ()
    """Ready MMPR pairs. Default: the cluster builds pairs from the SFT model's own answers."""

    val_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of pictures that a source with `split: auto` gives to validation."""

    test_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of pictures that a source with `split: auto` gives to the test split."""

    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """A run fails when a larger share of rows is quarantined."""

    max_image_bytes: PositiveInt = 8 * 1024 * 1024
    """Largest encoded picture, in bytes."""

    max_image_pixels: PositiveInt = 25_000_000
    """Largest picture, in pixels, checked before decoding."""

    max_image_side_px: PositiveInt = 8192
    """Longest side allowed, in pixels."""

    max_aspect_ratio: PositiveFloat = 20.0
    """Longest over shortest side; more is refused before any resize (a 1 x 600 picture would cost 293 MB)."""


class MiniworldConfig(Frozen):
    """The embedded data set: drawn scenes whose truth is known. Every field is an argument of `build_miniworld`."""

    train_scenes: PositiveInt = 8000
    """Training scenes of one picture, each with a caption and with questions."""

    change_scenes: PositiveInt = 2500
    """Training scenes of two pictures that differ, and as many of three frames in which something happens; each
    is asked both ways round."""

    reasoning_scenes: PositiveInt = 5000
    """Training scenes with two reasoning questions, answered as chains of thought."""

    prompt_scenes: PositiveInt = 2000
    """Training scenes kept for preference sampling: one reasoning question each, not used in SFT."""

    val_questions_per_task: PositiveInt = 30
    """Validation questions of each task."""

    test_questions_per_task: PositiveInt = 160
    """Test questions of each task but reasoning."""

    test_reasoning_questions: PositiveInt = 1000
    """Test questions of the reasoning task."""

    questions_per_scene: PositiveInt = 4
    """Questions about one training scene, at most one per task; rows of their own but for a few conversations."""

    image_size_px: PositiveInt = 72
    """Side of the square pictures; a multiple of 3, because the scene is a board of 3 x 3 cells."""

    max_objects: PositiveInt = 4
    """Most shapes in one scene, 3 to 6."""

    reasoning_max_objects: PositiveInt = 6
    """Most shapes in a scene made for reasoning questions, 3 to 9: more make the task harder."""

    chinese_fraction: float = Field(0.1, ge=0, le=1)
    """Share of captions and of direct questions about one picture that are Chinese."""


class TokenizerConfig(Frozen):
    """Byte-level BPE with ChatML markers and the `<image>` placeholder."""

    path: str | None = None
    """Local folder or hub id of a ready tokenizer. Default: trained on the corpus."""

    vocab_size: PositiveInt = 6400
    """Upper bound of entries, specials included; padded to a multiple of 64 in the model."""
