"""What a registered version consists of: files with their sha256, and where they come from. Plain files, no MLflow.

    manifest.json   {"digest": of all files, "files": {name: sha256}, "provenance": commit, settings, data, packages}
    README.md       the model card

Both describe the export's files and are not among them.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from minivlm.storage import file_sha256

CARD, MANIFEST = "README.md", "manifest.json"

REQUIRED_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""Besides weights: what model, processor and tokenizer are read from."""

PROVENANCE = ("git_commit", "source", "config_hash", "data", "draws", "seed", "version.torch", "version.transformers")
"""What a manifest must say of the way to the files; see `tracking.provenance`."""


def export_files(directory: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file but the card and the manifest."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    named = {path.relative_to(directory).as_posix(): path for path in paths}
    return {name: file_sha256(path) for name, path in named.items() if name not in (CARD, MANIFEST)}


def export_digest(files: Mapping[str, str]) -> str:
    """sha256 over names and contents: equal digests are equal exports."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def missing_files(names: set[str]) -> list[str]:
    """Required files that are not among the names."""
    missing = [name for name in REQUIRED_FILES if name not in names]
    return missing if any(name.endswith(".safetensors") for name in names) else [*missing, "*.safetensors"]


def read_manifest(directory: Path) -> tuple[str, dict[str, str], dict[str, str]]:
    """Digest, files and provenance as the manifest states them.

    Raises:
        ValueError: there is none, or it is none.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        digest = str(manifest["digest"])
        stated = [dict(manifest["files"]), dict(manifest.get("provenance", {}))]
        files, provenance = ({str(key): str(value) for key, value in part.items()} for part in stated)
    except FileNotFoundError:
        raise ValueError(f"its {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})") from None
    return digest, files, provenance


def check_manifest(directory: Path, digest: str) -> dict[str, str]:
    """Compare a downloaded version with its manifest, and that with what must be there.

    Args:
        digest: under which the version was registered.

    Returns:
        The provenance.

    Raises:
        ValueError: naming the first thing that is not as it must be.
    """
    stated_digest, files, provenance = read_manifest(directory)
    if stated_digest != digest or export_digest(files) != digest:
        raise ValueError(f"its {MANIFEST} is of another export ({stated_digest[:12]}, registered was {digest[:12]})")
    found = export_files(directory)
    for name in sorted(files.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{name} is missing from its files")
        if name not in files:
            raise ValueError(f"{name} is not in its {MANIFEST}")
        if files[name] != found[name]:
            raise ValueError(f"{name} is damaged: its sha256 begins with {found[name][:12]}, not {files[name][:12]}")
    if lacking := missing_files(set(found)):
        raise ValueError(f"it lacks {', '.join(lacking)}")
    if unsaid := [key for key in PROVENANCE if not provenance.get(key)]:
        raise ValueError(f"its {MANIFEST} does not say {', '.join(unsaid)}")
    return provenance
