"""Exports whose settings were changed: one clear error, soon, and no memory or time for what the files do not hold."""

import json
import time
from pathlib import Path

import pytest

from minivlm.model.checkpoint import CheckpointError
from minivlm.model.export import load_export, load_export_tower
from minivlm.model.image_tokens import read_tower_config
from minivlm.model.vision import VisionTower
from tests.tiny_export import build_export

SOON_S = 5


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Exports by projector kind."""
    return {kind: build_export(tmp_path_factory.mktemp(kind), kind) for kind in ("mlp2x_gelu", "resampler")}


@pytest.fixture
def changed(exports):
    """changed(kind, file, key, value): the export with one setting changed (key "": the whole file); put back later."""
    before: dict[Path, str] = {}

    def change(kind, file, key, value):
        path = exports[kind] / file
        before.setdefault(path, path.read_text())
        tree = {"whole": json.loads(before[path])}
        *outer, last = f"whole.{key}".removesuffix(".").split(".")
        part = tree
        for name in outer:
            part = part[name]
        part[last] = value
        path.write_text(json.dumps(tree["whole"]))
        return exports[kind]

    yield change
    for path, text in before.items():
        path.write_text(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text_config.hidden_size", "x"),
        ("text_config.vocab_size", 0),
        ("text_config.num_attention_heads", 0),
        ("text_config.hidden_act", "x"),
        ("text_config.rope_parameters", {"rope_type": "nope"}),
        ("text_config.dtype", "x"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("vision_feature_layer", [-1]),
    ],
)
def test_settings_that_mean_nothing_are_one_clear_error(changed, key, value):
    with pytest.raises(CheckpointError, match=r"describes no model|cannot be loaded"):
        load_export(changed("mlp2x_gelu", "config.json", key, value))


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "resampler"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vision_config.num_hidden_layers", 10**9),
        ("vision_config.hidden_size", 3 * 10**8),
        ("vision_config.image_size", 10**6),
        ("vision_config.num_attention_heads", -1),
    ],
)
def test_a_tower_that_the_files_do_not_hold_costs_nothing(changed, kind, key, value):
    folder, started = changed(kind, "config.json", key, value), time.monotonic()
    with pytest.raises(CheckpointError, match=r"sizes start at 1|its files hold"):
        load_export(folder)
    with pytest.raises(CheckpointError, match=r"sizes start at 1|its files hold"):
        load_export_tower(folder, batch_size=1)
    assert time.monotonic() - started < SOON_S


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text_config.vocab_size", 10**9),
        ("text_config.intermediate_size", 10**8),
        ("minivlm_projector.resampler_layers", 10**9),
        ("minivlm_projector.resampler_queries", 10**8),
    ],
)
def test_a_model_that_the_files_do_not_hold_costs_nothing(changed, key, value):
    folder, started = changed("resampler", "config.json", key, value), time.monotonic()
    with pytest.raises(CheckpointError, match="its files hold"):
        load_export(folder)
    assert time.monotonic() - started < SOON_S


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("image_processor.size", {"shortest_edge": 100_000}, "sides from 1"),
        ("image_processor.size", {"shortest_edge": 0}, "sides from 1"),
        ("image_processor.image_std", [0.0, 0.0, 0.0], "not finite"),
        ("image_processor.image_mean", [0.5], "fails at a plain picture"),
        ("image_processor.crop_size", {"height": 48, "width": 48}, "the vision tower reads 32 x 32"),
        ("image_processor", 3, "no complete vision tower"),
        ("", None, "no complete vision tower"),
    ],
)
def test_an_image_processor_that_would_fail_at_a_picture_fails_at_the_start(changed, key, value, reason):
    with pytest.raises(CheckpointError, match=reason):
        load_export_tower(changed("mlp2x_gelu", "processor_config.json", key, value), batch_size=1)


def test_an_image_processor_that_does_not_resize_is_refused_where_nothing_crops(siglip_folder, tmp_path):
    for path in Path(siglip_folder).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_resize": False}))
    with pytest.raises(ValueError, match="look at do_resize"):
        VisionTower.load(str(tmp_path), batch_size=1)


@pytest.mark.parametrize("value", [[], {}, None, "x"])
def test_what_is_said_of_the_head_must_mean_something(changed, value):
    with pytest.raises(CheckpointError, match="does not say whether the head is tied"):
        load_export(changed("mlp2x_gelu", "minivlm.json", "", value))


@pytest.mark.parametrize("vision", [5, {"hidden_size": "x"}])
def test_a_tower_folder_of_other_types_is_one_clear_error(tmp_path, vision):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": vision}))
    with pytest.raises(ValueError, match=r"No vision tower under .*Type clip\.path=FOLDER"):
        read_tower_config(str(tmp_path))
