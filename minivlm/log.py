"""One line format on stderr, one progress display, and silence for chatty libraries.

Every module takes its logger from `get_logger(__name__)`; loops that last longer than seconds use `Progress`.
Jobs call `quiet_libraries` first, because Ray, DeepSpeed and MLflow say more than a reader wants.
"""

import logging
import os
import sys
import time
from types import TracebackType

from tqdm import tqdm

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
CHATTY = (
    *("ray", "ray.data", "ray.train", "ray.tune", "ray.serve", "DeepSpeed", "deepspeed", "mlflow", "alembic"),
    *("transformers", "urllib3", "filelock", "httpx", "PIL"),
)
QUIET_ENVIRONMENT = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class _Stderr(logging.Handler):
    """Write to the present sys.stderr, above a progress bar if one is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def get_logger(name: str) -> logging.Logger:
    """Logger under `minivlm`, at INFO, on stderr, in one format.

    Args:
        name: usually `__name__`; a name outside the package is put under `minivlm.`.
    """
    package = logging.getLogger("minivlm")
    if not package.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False
    return package if name == "minivlm" else logging.getLogger(f"minivlm.{name.removeprefix('minivlm.')}")


def quiet_libraries() -> None:
    """Silence below ERROR what libraries print, here and in the processes started from here.

    Changes logging levels and environment variables, so jobs call it before they start Ray; a variable that the user
    has set is kept.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for library in CHATTY:
        logger = logging.getLogger(library)
        logger.setLevel(logging.ERROR)
        logger.addFilter(_is_error)  # DeepSpeed sets its own level again when it is imported


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


class Progress:
    """Show how far a loop is: a bar with the time left on a terminal, plain lines otherwise.

        with Progress(len(steps), "sft") as progress:
            for step in steps:
                progress.update(loss=train(step))

    Args:
        total: how many updates make the whole.
        label: what is being done, in one or two words.
        interval_s: least time between two plain lines, in seconds.
    """

    def __init__(self, total: int, label: str, *, interval_s: float = 5.0) -> None:
        self.total = total
        self.label = label
        self.interval_s = interval_s
        self.done = 0
        self._log = get_logger("progress")

    def __enter__(self) -> "Progress":
        self._start = self._last_line = time.monotonic()
        self._values: dict[str, float] = {}
        self._bar = tqdm(total=self.total, desc=self.label, file=sys.stderr) if sys.stderr.isatty() else None
        return self

    def update(self, n: int = 1, **values: float) -> None:
        """Count `n` more as done; `values` (a loss, say) are shown beside it."""
        self.done += n
        self._values = values or self._values
        if self._bar is not None:
            self._bar.set_postfix(self._values, refresh=False)
            self._bar.update(n)
        elif self.done < self.total and time.monotonic() - self._last_line >= self.interval_s:
            self._last_line = time.monotonic()
            self._log.info(self._line())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._log.info(self._line())

    def _line(self) -> str:
        elapsed = time.monotonic() - self._start
        rate = self.done / elapsed if elapsed > 0 else 0.0
        parts = [f"{self.label} {self.done}/{self.total}", f"{rate:.1f}/s", f"{_clock(elapsed)} elapsed"]
        if rate and self.done < self.total:
            parts.append(f"{_clock((self.total - self.done) / rate)} left")
        return ", ".join([*parts, *(f"{name} {value:.4g}" for name, value in self._values.items())])


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
