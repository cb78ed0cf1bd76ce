"""The one typed configuration tree. Every job calls `load_config(path, overrides)`.

Defaults live in these classes and nowhere else; `configs/*.yaml` hold what differs from them.
"""

from minivlm.config.base import STAGE_NAMES, ConfigError, StageName
from minivlm.config.load import Config, load_config

__all__ = ["STAGE_NAMES", "Config", "ConfigError", "StageName", "load_config"]
