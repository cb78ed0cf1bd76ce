"""A run belongs to the checkpoint that it started from."""

import json
from pathlib import Path

import pytest

from minivlm.config import Config, load_config
from minivlm.layout import run_dir
from minivlm.train.origin import ORIGIN_FILE, check_origin, write_origin
from minivlm.train.stages import TrainingError


@pytest.fixture
def config(tiny_config: Path, tmp_path: Path) -> Config:
    return load_config(tiny_config, [f"storage_path={tmp_path}"])


def finish_pretrain(config: Config, content: str) -> None:
    """What a finished stage leaves, as far as its checkpoint's identity goes."""
    folder = run_dir(config, "pretrain")
    (folder / "checkpoint" / "export").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint" / "manifest.json").write_text(content)
    paths = {"checkpoint_dir": str(folder / "checkpoint"), "export_dir": str(folder / "checkpoint" / "export")}
    (folder / "result.json").write_text(json.dumps(paths))


def test_a_run_goes_on_only_from_the_checkpoint_that_it_started_from(config: Config):
    finish_pretrain(config, "one")
    check_origin(config, "sft")  # nothing was started yet
    write_origin(config, "sft")
    check_origin(config, "sft")
    finish_pretrain(config, "another")
    with pytest.raises(TrainingError, match=r"sft-\w+ was trained from checkpoint \w{16}, .* is now \w{16}: delete"):
        check_origin(config, "sft")


def test_the_first_stage_and_one_whose_origin_is_gone_are_taken_as_they_are(config: Config):
    write_origin(config, "pretrain")
    assert not run_dir(config, "pretrain").exists()
    finish_pretrain(config, "one")
    write_origin(config, "sft")
    (run_dir(config, "pretrain") / "result.json").unlink()
    check_origin(config, "sft")


def test_a_record_that_cannot_be_read_is_named(config: Config):
    finish_pretrain(config, "one")
    write_origin(config, "sft")
    (run_dir(config, "sft") / ORIGIN_FILE).write_text("[]")
    with pytest.raises(TrainingError, match=r"origin\.json cannot be read"):
        check_origin(config, "sft")
