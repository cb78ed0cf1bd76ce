"""What every job's command line shares: arguments, and errors as one clear line.

A job is `typer` arguments -> `load_config` -> `connect` and one call of `minivlm.workflow` -> where the result is.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from minivlm.errors import JobError
from minivlm.workflow.cluster import disconnect

TINY = Path(__file__).parent.parent / "configs" / "tiny.yaml"
CONFIG = typer.Option(TINY, "--config", help="YAML settings; configs/tiny.yaml is the embedded default.")
OVERRIDES = typer.Argument(None, metavar="[KEY.PATH=VALUE]...", help="Settings that replace those of the file.")
USER_ERRORS = (ValueError, JobError, OSError)
"""Their message says all: what is wrong and what to type. ConfigError, DataError and CheckpointError are ValueErrors;
an OSError names the file and the reason (no space, no permission)."""

DRY_RUN = typer.Option(False, "--dry-run", help="Print the resolved settings, sizes and placement; run nothing.")


def run_job(main: Callable[..., Any]) -> None:
    """Run a typer command; a mistake of the user's ends as one line on stderr and exit code 2.

    MINIVLM_TRACEBACK=1 shows where it was raised.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(help=sys.modules["__main__"].__doc__)(main)
    try:
        app()
    except USER_ERRORS as error:
        if os.environ.get("MINIVLM_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        disconnect()
