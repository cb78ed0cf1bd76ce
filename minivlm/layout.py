"""Where everything lies under storage_path. Pure: a path's name carries the hash of all that determines its content.

    datasets/miniworld-H      drawn pictures and LLaVA JSON        samples-H    validated rows, quarantine
    datasets/samples-H/STAGE-H  drawn/: which of them the stage trains on; its token tables
    pictures/                 those that lay inside of rows, and frames of videos
    tokenizers/H  clip/H      what the corpus trained              features/F   patch features (F = tower fingerprint)
    clip_scores/F             how well rows' texts fit their pictures, where asked
    embeddings/F  retrieval/H  pictures and texts in the CLIP's shared space, and what finds what
    runs/STAGE-H              checkpoints of a training stage      pairs/H      preference pairs
    evaluations/NAME-H        answers, metrics, report             mlflow/      tracking database and artifacts

So a job finds its input without being told, the same command twice is one piece of work, and an override that
matters (in a Tune trial, say) gets a place of its own.
"""

import re
from pathlib import Path
from typing import Any

from minivlm.config import Config, StageName
from minivlm.storage import content_hash, file_sha256, manifest_of


def miniworld_dir(config: Config) -> Path:
    """Drawn data set."""
    return config.root / "datasets" / f"miniworld-{content_hash([FORMAT, config.seed, _values(config.miniworld)])}"


def classes_dir(config: Config) -> Path:
    """Drawn pictures of one shape, a folder for each class."""
    return config.root / "datasets" / f"classes-{content_hash([FORMAT, config.seed, config.miniworld.image_size_px])}"


def samples_dir(config: Config) -> Path:
    """Validated rows of every stage and split."""
    return config.root / "datasets" / f"samples-{content_hash(_data_key(config))}"


def stage_rows_dir(config: Config, stage: str) -> Path:
    """What becomes of the validated rows of a stage: the draw, and beside it its token tables."""
    return samples_dir(config) / f"{stage}-{content_hash(_draw_key(config, stage))}"


def draw_dir(config: Config, stage: str) -> Path:
    """Which training rows the stage draws: copies.npy, mixture.json."""
    return stage_rows_dir(config, stage) / "drawn"


def pictures_dir(config: Config) -> Path:
    """Pictures that lay inside of rows and chosen frames of videos, each under its digest."""
    return config.root / "pictures"


def tokenizer_dir(config: Config) -> Path:
    """Trained tokenizer (unused where tokenizer.path is set)."""
    return config.root / "tokenizers" / content_hash([_data_key(config), _values(config.tokenizer)])


def clip_dir(config: Config) -> Path:
    """Trained CLIP (unused where clip.path is set)."""
    return config.root / "clip" / content_hash(_clip_key(config))


def tokenizer_path(config: Config) -> str:
    """The tokenizer to load: the configured folder or hub id, else the trained one."""
    return config.tokenizer.path or str(tokenizer_dir(config))


def tower_path(config: Config) -> str:
    """The CLIP to load: the configured folder or hub id, else the trained one."""
    return config.clip.path or str(clip_dir(config))


def features_root(config: Config) -> Path:
    """Parent of the feature caches; each has the tower's fingerprint as its name."""
    return config.root / "features"


def scores_root(config: Config) -> Path:
    """Parent of the caches of CLIP scores; each has the CLIP's fingerprint as its name."""
    return config.root / "clip_scores"


def embeddings_root(config: Config) -> Path:
    """Parent of the caches of embeddings; each has the CLIP's fingerprint as its name."""
    return config.root / "embeddings"


def retrieval_root(config: Config) -> Path:
    """Parent of the results of retrieval and zero-shot classification; a name hashes all that determines them."""
    return config.root / "retrieval"


def run_dir(config: Config, stage: StageName) -> Path:
    """Checkpoints, metrics and result of one training stage."""
    return config.root / "runs" / f"{stage}-{content_hash(_run_key(config, stage))}"


def pairs_dir(config: Config) -> Path:
    """Preference pairs built or read for the MPO stage."""
    return config.root / "pairs" / content_hash(_pairs_key(config))


def evaluation_dir(config: Config, name: str, reference: str) -> Path:
    """Answers and metrics of one export on the test split.

    Args:
        name: what readers see; characters that a path should not hold become `-`.
        reference: stands for the export's content.
    """
    variants = config.evaluation.variants
    answers = config.evaluation.model_dump(mode="json", exclude=_SHOWING)
    asked = [path for given in config.evaluation.benchmarks for path in (*given.files, given.images) if path]
    files = [_location_key(str(path)) for path in asked]
    shots = [_draw_key(config, stage) for stage in ("sft", "pretrain")] if "few_shot" in variants else []
    own = [SCORING, config.model.max_length_tokens, answers, files, shots]
    key = [name, reference, config.seed, _data_key(config), _tower_key(config), own]
    return config.root / "evaluations" / f"{re.sub(r'[^A-Za-z0-9._+-]+', '-', name)}-{content_hash(key)}"


def mlflow_dir(config: Config) -> Path:
    """Default tracking database and artifacts."""
    return config.root / "mlflow"


def _values(section: Any) -> Any:
    return section.model_dump(mode="json")


def _location_key(location: str) -> list[Any]:
    """Sizes and times stand for the content of a user's files; what is missing is reported by its reader.

    Of a catalogue the catalogue alone counts, of a hub data set its name.
    """
    if "://" in location:
        return [location]
    path = Path(location).expanduser().absolute()
    try:
        files = [path] if path.is_file() else sorted(path.rglob("*") if path.is_dir() else path.parent.glob(path.name))
    except (ValueError, OSError):
        files = []
    found = [(file, file.stat()) for file in files if file.is_file()]
    return [str(path), [[str(file), status.st_size, status.st_mtime_ns] for file, status in found]]


_SHOWING = {
    *("num_actors", "cpus_per_actor", "gpus_per_actor", "threads_per_actor"),
    *("exports", "baseline", "report_samples_per_task", "heat_maps", "max_bad_fraction"),
}
"""Settings of an evaluation that change neither a question nor an answer."""

SCORING = 1
"""Raised when the same answers are scored otherwise, so that no score is compared with one of another kind."""

FORMAT = 4
"""Raised when the same settings draw other scenes, validate otherwise or train another tokenizer."""


_DRAWING = {"weight", "max_rows", "repeat", "min_rating", "min_clip_score"}
"""Settings of a source that choose among its validated rows."""


def _data_key(config: Config) -> list[Any]:
    data = config.data
    groups = (data.pretrain, data.sft, data.prompts, data.mpo)
    files = [_location_key(source.path) for group in groups for source in group]
    given = [[source.model_dump(mode="json", exclude={*_DRAWING, "verifier"}) for source in group] for group in groups]
    kept = [[sorted(source.min_rating) for source in group] for group in groups]
    rest = data.model_dump(mode="json", exclude={"pretrain", "sft", "prompts", "mpo", "mixture", "features"})
    world = _values(config.miniworld) if config.uses_miniworld else None
    return [FORMAT, config.seed, given, kept, rest, data.mixture.finds_by, world, files]


def _draw_key(config: Config, stage: str) -> list[Any]:
    sources = getattr(config.data, stage)
    given = [source.model_dump(mode="json", include=_DRAWING) for source in sources]
    is_scored = any(source.min_clip_score is not None for source in sources)
    return [given, _values(getattr(config.data.mixture, stage)), _tower_key(config) if is_scored else None]


_ENCODING = ("feature_layer", "encode_batch_size", "encode_precision")
"""Settings of the tower that change its features, but not how it is trained."""


def _clip_key(config: Config) -> list[Any]:
    placement = {"num_encoders", "cpus_per_encoder", "gpus_per_encoder"}
    values = config.clip.model_dump(mode="json", exclude={*_ENCODING, *placement})
    return [_data_key(config), values, _values(config.tokenizer), config.train.precision]


def _tower_key(config: Config) -> list[Any]:
    return [_clip_key(config), [getattr(config.clip, name) for name in _ENCODING]]


def _run_key(config: Config, stage: StageName) -> list[Any]:
    train = config.train
    numerics = [config.seed, train.precision, train.pack_length_tokens]  # a run may go on with other workers
    own = [stage, numerics, _values(getattr(train, stage)), _draw_key(config, stage)]
    if stage == "pretrain":
        return [own, *_tower_key(config), _values(config.model)]
    if stage == "sft":
        return [own, _run_key(config, "pretrain")]
    return [own, _pairs_key(config)]


def _pairs_key(config: Config) -> list[Any]:
    draws = [_draw_key(config, stage) for stage in ("pretrain", "sft", "prompts", "mpo")]
    verifiers = [[source.verifier for source in group] for group in (config.data.prompts, config.data.sft)]
    settings = config.preferences.model_dump(mode="json", exclude={"policy", "min_pairs"})
    return [_policy_key(config), settings, draws, verifiers]


def _policy_key(config: Config) -> list[Any]:
    """What determines the model that answers: the SFT run, or the weights that were given instead, wherever they lie.

    A checkpoint's manifest holds the digest of every file; of folders that none speaks for, sizes and times must do.
    """
    policy = config.preferences.policy
    if policy is None:
        return _run_key(config, "sft")
    manifest = manifest_of(policy.expanduser().absolute())
    weights = [file_sha256(manifest)] if manifest else _location_key(str(policy))
    return [weights, *_tower_key(config), _values(config.model)]
