"""What every settings class shares."""

from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

StageName = Literal["pretrain", "sft", "mpo"]
STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)


class ConfigError(ValueError):
    """A setting is wrong; the message names the key and says what to type."""


class Frozen(BaseModel):
    """Base of every settings class: immutable, unknown keys refused, docs under each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def cpu_has_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for bfloat16 products, as Linux lists them; False where unknown."""
    try:
        listed = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(listed)
