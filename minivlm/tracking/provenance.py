"""Where a run comes from: commit, source, settings, data, library versions, seed."""

import hashlib
import subprocess
from importlib.metadata import version
from pathlib import Path

from minivlm import layout
from minivlm.config import STAGE_NAMES, Config
from minivlm.storage import content_hash

LIBRARIES = ("ray", "torch", "deepspeed", "transformers", "mlflow")


def provenance_tags(config: Config) -> dict[str, str]:
    """Tags of every run."""
    return {
        "git_commit": git_commit(Path(__file__).parent),
        "source": source_digest(Path(__file__).parents[1]),
        "config_hash": content_hash(config.model_dump(mode="json")),
        "data": layout.samples_dir(config).name,
        "draws": ", ".join(layout.stage_rows_dir(config, stage).name for stage in STAGE_NAMES),
        "seed": str(config.seed),
        **{f"version.{library}": version(library) for library in LIBRARIES},
    }


def source_digest(package: Path) -> str:
    """First 16 hex digits of the sha256 over all Python files below a folder: names the code where no commit does."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def git_commit(directory: Path) -> str:
    """Commit of the checkout that holds `directory`, with `-dirty` where files differ; `unknown` outside of one.

    A Ray job runs in an unpacked copy without history, so `unknown` is normal there.
    """
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
