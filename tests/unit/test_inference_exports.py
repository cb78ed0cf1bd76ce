"""Any export folder as a model to evaluate: named by its content, refused where it does not fit the others."""

from pathlib import Path

import pytest

from minivlm.config import ConfigError
from minivlm.inference.exports import check_tower, folder_export
from minivlm.model.export import load_export_tower
from tests.tiny_export import build_export


def test_the_reference_is_the_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    first, second = (folder_export("base", tmp_path / name) for name in ("a", "b"))
    assert first.reference == second.reference
    assert (first.stage, first.export_dir) == (None, tmp_path / "a")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"weightz")
    assert folder_export("base", tmp_path / "b").reference != first.reference


def test_a_folder_without_an_export_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.exports\.base: .* holds no export .*jobs\.export"):
        folder_export("base", tmp_path)


def test_an_export_that_sees_through_another_tower_is_refused(tmp_path: Path) -> None:
    export = folder_export("base", build_export(tmp_path))
    own = load_export_tower(export.export_dir, precision="float32", batch_size=4).fingerprint
    check_tower(export, own, "float32", 4)
    with pytest.raises(ConfigError, match=r"evaluation\.exports\.base: .* another vision tower"):
        check_tower(export, "0" * 16, "float32", 4)
