"""Checkpoints that are committed or do not exist.

    run_dir/checkpoints/step=00000100/   engine/ (shards)   export/ (inference export)   manifest.json

All ranks write under a temporary name; when they are done, one of them calls `commit`: the manifest with the sha256 of
every file, fsync, rename. Resume reads manifests, never another library's markers, because those shards are pickles
that may be opened only if our run wrote them.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from minivlm.storage import file_sha256, write_json

MANIFEST = "manifest.json"
COMMITTED = "step=" + 8 * "[0-9]"
"""Names of committed folders; a copy that somebody made beside them is none."""

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint or an export is incomplete or not what it claims to be."""


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Place of the committed checkpoint of one optimizer step."""
    return run_dir / "checkpoints" / f"step={step:08d}"


def temporary_dir(run_dir: Path, step: int) -> Path:
    """Where all ranks write before `commit`; the same on each. One rank must empty it first: `begin`."""
    return run_dir / "checkpoints" / f".step={step:08d}.tmp"


def begin(run_dir: Path, step: int) -> Path:
    """A new temporary folder; those of interrupted attempts go first, as a full disk may be what interrupted them.

    Rank 0 calls it before a barrier.
    """
    temporary = temporary_dir(run_dir, step)
    for leftover in temporary.parent.glob(".step=*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def commit(run_dir: Path, step: int, meta: dict[str, Any]) -> Path:
    """Make the temporary folder the checkpoint of `step`. Rank 0 calls it after a barrier.

    Args:
        meta: what the manifest says besides the files: stage, step, world_size, zero_stage, metrics, client_state.

    Returns:
        The committed folder. One of the same step (a corrupt one that resume passed over, say) is replaced.
    """
    temporary, final = temporary_dir(run_dir, step), checkpoint_dir(run_dir, step)
    write_manifest(temporary, meta)
    for path in [*temporary.rglob("*"), temporary]:
        _fsync(path)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    _fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    return final


def write_manifest(directory: Path, meta: dict[str, Any]) -> None:
    """Write manifest.json: `meta` and the sha256 of every other file under `directory`."""
    files = {name: file_sha256(directory / name) for name in _file_names(directory)}
    write_json(directory / MANIFEST, {**meta, "files": files})


def verify_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a committed folder, after comparing every file with it.

    Raises:
        CheckpointError: no manifest, a file that is missing, altered or not listed.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        files = dict(manifest["files"])
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {MANIFEST}: it was never committed. Delete it") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{directory / MANIFEST} cannot be read ({error}). Delete the folder") from error
    present = set(_file_names(directory))
    differing = sorted(present.symmetric_difference(files))
    if differing:
        state = "missing" if differing[0] in files else "not in the manifest"
        raise CheckpointError(
            f"{directory}: {differing[0]} is {state} ({len(differing)} such files). Delete the folder"
        )
    for name, digest in files.items():
        if file_sha256(directory / name) != digest:
            raise CheckpointError(f"{directory}: {name} differs from its sha256 in {MANIFEST}. Delete the folder")
    return dict(manifest)


def newest_complete(run_dir: Path) -> Path | None:
    """The committed checkpoint with the highest step whose files are all intact; None without any.

    Incomplete or corrupt ones are passed over with a warning that says why.
    """
    for path in sorted((run_dir / "checkpoints").glob(COMMITTED), reverse=True):
        try:
            _check_step(path, verify_manifest(path))
        except CheckpointError as error:
            logger.warning("Checkpoint passed over: %s", error)
            continue
        return path
    return None


def prune(run_dir: Path, keep: int, *, newest: int) -> None:
    """Delete all but the `keep` newest committed checkpoints, and what interrupted saves left.

    Args:
        newest: step that was just committed. Those of later steps are corrupt, or resume would not have passed them
            over; they go, instead of taking the place of good ones.
    """
    checkpoints = run_dir / "checkpoints"
    committed = sorted(checkpoints.glob(COMMITTED), reverse=True)
    good = [path for path in committed if path <= checkpoint_dir(run_dir, newest)][:keep]
    for path in [*(path for path in committed if path not in good), *checkpoints.glob(".step=*")]:
        shutil.rmtree(path)


def _check_step(directory: Path, manifest: dict[str, Any]) -> None:
    if manifest.get("step") != int(directory.name.removeprefix("step=")):
        raise CheckpointError(f"{directory / MANIFEST} is of step {manifest.get('step')}. Delete the folder")


def _file_names(directory: Path) -> list[str]:
    paths = (path for path in directory.rglob("*") if not path.is_dir())
    return sorted(name for path in paths if (name := path.relative_to(directory).as_posix()) != MANIFEST)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
