"""The commit protocol: what is not complete does not exist."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minivlm.model.checkpoint import (
    CheckpointError,
    begin,
    checkpoint_dir,
    commit,
    newest_complete,
    prune,
    temporary_dir,
    verify_manifest,
    write_manifest,
)

REPOSITORY = Path(__file__).parents[3]
SAVE_FOREVER = """
import sys
from pathlib import Path
from minivlm.model.checkpoint import begin, commit
for step in range(1, 100_000):
    folder = begin(Path(sys.argv[1]), step)
    (folder / "engine").mkdir()
    for shard in range(4):
        (folder / "engine" / f"{shard}.pt").write_bytes(bytes([step % 256]) * 200_000)
    commit(Path(sys.argv[1]), step, {"step": step})
    print(step, flush=True)
"""


def save(run_dir, step, text="weights"):
    folder = begin(run_dir, step)
    (folder / "engine").mkdir()
    (folder / "engine" / "shard.pt").write_text(text)
    (folder / "config.json").write_text("{}")
    return commit(run_dir, step, {"step": step, "stage": "sft"})


def test_manifest_lists_every_file_with_its_sha256(tmp_path):
    manifest = verify_manifest(save(tmp_path, 100))
    assert (manifest["step"], manifest["stage"]) == (100, "sft")
    assert manifest["files"] == {
        "config.json": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "engine/shard.pt": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
    }
    assert not temporary_dir(tmp_path, 100).exists()


def test_newest_is_the_highest_step(tmp_path):
    for step in (9, 1000, 200):
        save(tmp_path, step)
    assert newest_complete(tmp_path) == tmp_path / "checkpoints" / "step=00001000"
    assert newest_complete(tmp_path / "other") is None


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: os.truncate(folder / "engine" / "shard.pt", 3), "differs from its sha256"),
        (lambda folder: os.truncate(folder / "manifest.json", 20), "cannot be read"),
        (lambda folder: (folder / "manifest.json").unlink(), "never committed"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "engine" / "evil.pt").write_text("x"), "evil.pt is not in the manifest"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "cannot be read"),
    ],
)
def test_spoilt_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, spoil, reason):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    spoil(bad)
    with pytest.raises(CheckpointError, match=reason):
        verify_manifest(bad)
    assert newest_complete(tmp_path) == good
    assert reason in caplog.text


def test_interrupted_save_leaves_the_older_checkpoint(tmp_path):
    good = save(tmp_path, 1)
    (begin(tmp_path, 2) / "half").write_text("x")
    write_manifest(temporary_dir(tmp_path, 2), {"step": 2})
    assert newest_complete(tmp_path) == good


def test_a_new_save_first_frees_what_an_interrupted_one_left(tmp_path):
    begin(tmp_path, 8)
    assert [path.name for path in begin(tmp_path, 5).parent.iterdir()] == [".step=00000005.tmp"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, "old")
    os.truncate(checkpoint_dir(tmp_path, 1) / "config.json", 1)
    again = save(tmp_path, 1, "new")
    assert (again / "engine" / "shard.pt").read_text() == "new"
    assert newest_complete(tmp_path) == again


def test_prune_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    begin(tmp_path, 4)
    prune(tmp_path, 2, newest=3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step=00000002", "step=00000003"]


def test_prune_never_keeps_a_spoilt_checkpoint_instead_of_a_good_one(tmp_path):
    """Step 8 was spoilt, so the run went on from the start and has just saved step 4."""
    spoilt, good = save(tmp_path, 8), save(tmp_path, 4)
    os.truncate(spoilt / "config.json", 1)
    prune(tmp_path, 1, newest=4)
    assert newest_complete(tmp_path) == good
    assert not spoilt.exists()


def test_a_copy_beside_the_checkpoints_is_none_of_them(tmp_path):
    good = save(tmp_path, 2)
    copy = shutil.copytree(good, good.with_name("step=00000002.bak"))
    misnamed = shutil.copytree(good, checkpoint_dir(tmp_path, 3))
    assert newest_complete(tmp_path) == good
    prune(tmp_path, 1, newest=2)
    assert (good.exists(), copy.exists(), misnamed.exists()) == (True, True, False)


@pytest.mark.parametrize("delay_s", [0.0, 0.011, 0.023])
def test_process_killed_while_saving_loses_at_most_the_current_step(tmp_path, delay_s):
    command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY)
    printed = [process.stdout.readline() for _ in range(3)]
    time.sleep(delay_s)
    process.kill()
    last_printed = int((process.stdout.read().split() or [printed[-1]])[-1])
    process.wait()
    newest = newest_complete(tmp_path)
    assert last_printed <= verify_manifest(newest)["step"] <= last_printed + 1
    step = verify_manifest(newest)["step"]
    assert (newest / "engine" / "3.pt").read_bytes() == bytes([step % 256]) * 200_000
