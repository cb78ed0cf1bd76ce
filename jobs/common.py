"""What every job's command line shares: arguments, the Ray connection, and errors as one clear line.

A job is `typer` arguments -> `load_config` -> one call of `minivlm.workflow` -> where the result is.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import typer
from ray.data import DataContext
from transformers.utils.logging import disable_progress_bar

from minivlm.config import Config, ConfigError
from minivlm.data.errors import DataError
from minivlm.log import quiet_libraries
from minivlm.model.checkpoint import CheckpointError
from minivlm.serve.app import ServeError
from minivlm.train.stages import TrainingError

TINY = Path(__file__).parent.parent / "configs" / "tiny.yaml"
CONFIG = typer.Option(TINY, "--config", help="YAML settings; configs/tiny.yaml is the embedded default.")
OVERRIDES = typer.Argument(None, metavar="[KEY.PATH=VALUE]...", help="Settings that replace those of the file.")
USER_ERRORS = (ConfigError, DataError, TrainingError, CheckpointError, ServeError, FileNotFoundError)
"""Their message says all: what is wrong and what to type."""

DRY_RUN = typer.Option(False, "--dry-run", help="Print the resolved settings, sizes and placement; run nothing.")


def run_job(main: Callable[..., Any]) -> None:
    """Run a typer command; a mistake of the user's ends as one line on stderr and exit code 2, without a traceback."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(help=sys.modules["__main__"].__doc__)(main)
    try:
        app()
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def connect(config: Config) -> None:
    """Attach to the cluster of `cluster.address` or of the surrounding Ray job, else start a local one.

    Raises:
        ConfigError: nothing answers at the address.
    """
    quiet_libraries()
    DataContext.get_current().enable_progress_bars = False  # minivlm.log.Progress shows what matters
    disable_progress_bar()
    settings = config.cluster
    address = settings.address or os.environ.get("RAY_ADDRESS")
    environment = {"TOKENIZERS_PARALLELISM": "false", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    os.environ.update(environment)  # the driver is ours: Ray reads these when it starts
    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": environment},
    }
    if address:
        try:
            ray.init(address=address, **common)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(f"No Ray cluster answers at {address} ({error}). Start one: ray start --head") from None
        return
    ray.init(
        num_cpus=settings.num_cpus,
        object_store_memory=settings.object_store_bytes,
        dashboard_host="127.0.0.1",
        dashboard_port=settings.dashboard_port,
        **common,
    )
