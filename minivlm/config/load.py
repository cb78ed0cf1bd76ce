"""The whole tree, and the way from a YAML file and `key.path=value` overrides to it."""

import difflib
import os
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from minivlm.config.base import STAGE_NAMES, ConfigError, Frozen
from minivlm.config.data import DataConfig, MiniworldConfig, StageMixture, TokenizerConfig
from minivlm.config.model import ClipConfig, ModelConfig
from minivlm.config.preferences import PreferencesConfig
from minivlm.config.run import ClusterConfig, EvaluationConfig, ServeConfig, TrackingConfig, TuneConfig
from minivlm.config.train import StageConfig, TrainConfig


def _default_storage() -> Path:
    return Path(os.environ.get("MINIVLM_HOME", "~/.minivlm"))


class Config(Frozen):
    """Everything that determines a run."""

    seed: int = 0
    storage_path: Path = Field(default_factory=_default_storage)
    """Root of all that is written. Several nodes need a shared one. Default: $MINIVLM_HOME, else ~/.minivlm."""

    cluster: ClusterConfig = ClusterConfig()
    data: DataConfig = DataConfig()
    miniworld: MiniworldConfig = MiniworldConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    clip: ClipConfig = ClipConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tune: TuneConfig = TuneConfig()
    tracking: TrackingConfig = TrackingConfig()
    serve: ServeConfig = ServeConfig()

    @property
    def root(self) -> Path:
        """storage_path, absolute."""
        return self.storage_path.expanduser().resolve()

    @property
    def uses_miniworld(self) -> bool:
        """True when no source is configured."""
        return not (self.data.pretrain or self.data.sft or self.data.prompts or self.data.mpo)

    @model_validator(mode="after")
    def _spans(self) -> "Config":
        if self.data.val_fraction + self.data.test_fraction >= 1:
            raise ValueError(
                "data.val_fraction + data.test_fraction leave no training rows: add data.val_fraction=0.05"
            )
        if any(source.split not in ("auto", "train") for source in self.data.mpo):
            raise ValueError("all pairs of data.mpo are trained on: remove `split`, or the source")
        if not self.uses_miniworld and not (self.data.pretrain and self.data.sft):
            raise ValueError(
                "data.pretrain and data.sft are needed together: add the missing one, or remove all sources"
            )
        if self.data.mixture.mpo != StageMixture() and not self.data.mpo:
            raise ValueError("data.mixture.mpo draws from data.mpo, which lists no source: remove it, or add a source")
        if self.data.mixture.prompts != StageMixture() and not (self.data.prompts or self.uses_miniworld):
            raise ValueError(
                "data.mixture.prompts draws from data.prompts, which lists no source: questions come from what "
                "data.mixture.sft draws, so set that instead"
            )
        if self.train.mpo.dpo_weight + self.train.mpo.bco_weight + self.train.mpo.sft_weight == 0:
            raise ValueError("all weights of train.mpo are 0, nothing would be learned: add train.mpo.dpo_weight=0.8")
        language = self.model.language_model
        for name in STAGE_NAMES:
            stage: StageConfig = getattr(self.train, name)
            is_all = 2 * stage.edge_layers >= language.num_hidden_layers
            if "language_model.edges" in stage.trainable and language.path is None and is_all:
                raise ValueError(
                    f"train.{name}.edge_layers={stage.edge_layers} at each end are all of the "
                    f"{language.num_hidden_layers} layers: type train.{name}.trainable=[projector,language_model]"
                )
        if self.clip.image_size_px % self.clip.patch_size_px:
            raise ValueError("clip.image_size_px must be a multiple of clip.patch_size_px: type clip.patch_size_px=24")
        self._check_projector()
        return self

    def _check_projector(self) -> None:
        """What can be known of the projectors before a tower or a language model is loaded."""
        kinds, model = {self.model.projector, *self.tune.projectors}, self.model
        patches = self.clip.image_size_px // self.clip.patch_size_px
        if "pixel_shuffle" in kinds and self.clip.path is None and model.pixel_shuffle_factor > patches:
            raise ValueError(
                f"model.pixel_shuffle_factor={model.pixel_shuffle_factor} does not fit into {patches} x {patches} "
                f"patches: type model.pixel_shuffle_factor=2, or a smaller clip.patch_size_px"
            )
        width = model.language_model.hidden_size
        if "resampler" in kinds and model.language_model.path is None and width % model.resampler_heads:
            fitting = max(heads for heads in range(1, model.resampler_heads) if width % heads == 0)
            raise ValueError(
                f"model.resampler_heads={model.resampler_heads} does not divide model.language_model.hidden_size="
                f"{width}: type model.resampler_heads={fitting}"
            )


def load_config(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `key.path=value` overrides (values are YAML), and validate.

    Raises:
        ConfigError: unreadable file, malformed override, unknown key (with the nearest known one), bad value.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ConfigError(f"No config file {path}. Type --config configs/tiny.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a text file: {error}. Type --config configs/tiny.yaml") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold `key: value` settings, not a {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"`{override}` is no override: type key.path=value, for example train.sft.epochs=2")
    *parents, leaf = key.split(".")
    node: Any = tree
    for depth, parent in enumerate(parents):
        if isinstance(node, list):
            node = node[_item(override, parents[:depth], parent, len(node))]
        else:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict | list):
        raise ConfigError(f"`{override}`: a part of `{key}` is a value, not a group of settings")
    try:
        value = _number(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"`{override}`: the value is not YAML ({error.__class__.__name__})") from None
    if isinstance(node, list):
        node[_item(override, parents, leaf, len(node))] = value
    else:
        node[leaf] = value


def _item(override: str, parents: list[str], part: str, count: int) -> int:
    """Place in a list of the file; messages name its items so, as in data.sft.0.weight."""
    if part.isdecimal() and int(part) < count:
        return int(part)
    raise ConfigError(f"`{override}`: `{'.'.join(parents)}` is a list of {count} item(s), counted from 0")


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-3` as text; people mean a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        message = f"{key or 'config'}: {item['msg'].removeprefix('Value error, ')}"
        return message if isinstance(item["input"], dict) else f"{message} (got {str(item['input'])[:80]!r})"
    parent: Any = Config
    for part in item["loc"][:-1]:
        parent = _group(parent, part)
    known = list(parent.model_fields) if parent else []
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f"Did you mean `{near[0]}`?" if near else f"Known here: {', '.join(known)}."
    return f"Unknown setting `{key}`. {hint}"


def _group(parent: Any, part: str | int) -> Any:
    if parent is None or isinstance(part, int):
        return parent
    field = parent.model_fields.get(part)
    candidates = [field.annotation, *get_args(field.annotation)] if field else []
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
