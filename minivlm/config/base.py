"""What every settings class shares."""

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

StageName = Literal["pretrain", "sft", "mpo"]
STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)


class ConfigError(ValueError):
    """A setting is wrong; the message names the key and says what to type."""


class Frozen(BaseModel):
    """Base of every settings class: immutable, unknown keys refused, docs under each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
