"""Settings of the data: sources, limits on pictures, the embedded miniworld, the tokenizer."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from minivlm.config.base import Frozen

VerifierName = Literal["exact", "relaxed", "anls", "choice", "numeric", "vqa"]


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

    weight: PositiveFloat | None = None
    """Share of the draws, relative to the other weighted sources of the stage; the scarcest of them is used whole, so
    give a small one `repeat` to have more of all. Default: all rows, whatever the weights of others."""

    max_rows: PositiveInt | None = None
    """Most different training rows used, chosen by the stage's seed."""

    repeat: float = Field(1.0, gt=0, le=100)
    """How often each training row is used: 2.5 is every row twice and half of them once more, 0.25 a quarter of them.
    Times the `repeat_time` of MMPR's meta.json."""

    verifier: VerifierName = "exact"
    """When a sampled answer to a question of data.prompts (without prompts: of data.sft) is right; docs/preferences.md
    has the table. `relaxed` is within 5 %, `anls` for texts read from documents, `choice` for letters of options."""

    min_rating: dict[str, float] = Field({})
    """Least rating by column, as FineVision's {relevance_ratings: 4}. A column holds a number, or one for each answer:
    answers below it are left out, and rows without any other. What has no rating stays."""

    min_clip_score: float | None = Field(None, ge=-1, le=1)
    """Least cosine of a training row's pictures and its answers in the space of the CLIP model (`clip.path`, or the one
    trained here). Rows without pictures stay."""


class StageMixture(Frozen):
    """Which validated training rows a stage draws from its sources. Val and test rows are never dropped or repeated."""

    seed: int = 0
    """Of every choice below, and of `max_rows`, `repeat` and `weight` of the sources."""

    duplicates: Literal["keep", "drop_equal", "drop_near"] = "keep"
    """`drop_equal`: of rows with the same pictures (by digest) and the same text only the first is used, and none that
    asks a val or test row's question about its pictures. `drop_near`: nearly the same text counts too."""

    near_similarity: float = Field(0.8, ge=0.5, lt=1)
    """Of `drop_near`: share of common pieces of five characters (Jaccard, estimated to about 0.04) from which on texts
    count as the same. Questions from templates differ in one word: they want 0.95."""

    across_pictures: bool = False
    """Whether `drop_near` also compares rows about different pictures."""

    max_rows_per_picture: PositiveInt | None = None
    """Most rows about the same pictures (by digest); the first are used. 1 keeps one row of each picture."""

    max_draws_per_task: PositiveInt | None = None
    """Draws of one task, repeats counted, above which it is thinned."""

    task_exponent: float = Field(0.0, ge=0, lt=1)
    """How a task grows above max_draws_per_task=K: n draws become K (n/K)^task_exponent. 0: a hard limit."""

    @model_validator(mode="after")
    def _take_effect(self) -> "StageMixture":
        if self.task_exponent and self.max_draws_per_task is None:
            raise ValueError("task_exponent says how tasks grow above max_draws_per_task: set that, too, to a number")
        if self.across_pictures and self.duplicates != "drop_near":
            raise ValueError("across_pictures is about near duplicates: set duplicates, too, to drop_near")
        return self


class MixtureConfig(Frozen):
    """What each stage draws."""

    pretrain: StageMixture = StageMixture()
    sft: StageMixture = StageMixture()
    prompts: StageMixture = StageMixture()
    mpo: StageMixture = StageMixture()

    @property
    def finds_by(self) -> tuple[bool, bool]:
        """Whether any stage compares keys of rows, and signatures of texts: they are made where rows are validated."""
        stages = (self.pretrain, self.sft, self.prompts, self.mpo)
        near = any(stage.duplicates == "drop_near" for stage in stages)
        keys = any(stage.duplicates != "keep" or stage.max_rows_per_picture is not None for stage in stages)
        return keys, near


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

    features: Literal["cached", "stream"] = "cached"
    """When pictures are encoded: those of drawn, val and test rows before training, or by encoder actors beside the
    trainer, on the way of each batch. Batches are the same to the bit, and what was encoded stays in the cache."""

    mixture: MixtureConfig = MixtureConfig()
    """Duplicates and balance of each stage; weights, caps and thresholds of one source stand with the source."""

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

    turns: Literal["all", "first"] = "all"
    """What is kept of a conversation: every turn, each answer and its end token learned; or only up to the end of the
    first answer, as MiniMind-V's fine-tuning data, so that long texts do not weigh a small model down."""

    video_frames: int = Field(8, ge=1, le=64)
    """Pictures that a video becomes, at most: a frame is taken once."""

    video_rule: Literal["uniform", "scene"] = "uniform"
    """`uniform`: in the middles of equal parts of the time. `scene`: the first frame and those that differ most from
    the one before (decodes all of the video). minivlm/data/video.py has the exact rules."""

    video_side_px: PositiveInt = 768
    """Longest side of a frame that is kept; larger ones are made smaller."""

    max_video_bytes: PositiveInt = 512 * 1024 * 1024
    """Largest video file, in bytes."""

    max_video_s: PositiveFloat = 3600.0
    """Longest video, in seconds."""

    max_video_frames: PositiveInt = 120_000
    """Most frames decoded of one video. Their pixels and shape are limited as those of pictures."""

    max_video_decode_s: PositiveFloat = 300.0
    """Most CPU time for one video, in seconds."""


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

    direct_reasoning_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the training scenes with reasoning questions that also ask one of them for the number alone, so that
    answers with and without a chain of thought can be compared."""

    naming_fraction: float = Field(0.5, ge=0, le=1)
    """Share of the chains of thought that name every shape before they count: the longer habit."""

    chinese_fraction: float = Field(0.1, ge=0, le=1)
    """Share of captions and of direct questions about one picture that are Chinese."""


class TokenizerConfig(Frozen):
    """Byte-level BPE with ChatML markers and the `<image>` placeholder."""

    path: str | None = None
    """Local folder or hub id of a ready tokenizer. Default: trained on the corpus."""

    vocab_size: PositiveInt = 6400
    """Upper bound of entries, specials included; padded to a multiple of 64 in the model."""
