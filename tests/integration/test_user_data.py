"""The main job on a folder of real photos: `pytest tests/integration --user-data DIR`.

DIR holds photos_pretrain.json and photos_sft.json (LLaVA), photos_mmpr.jsonl (MMPR) and photos/. With six photos the
model can only memorise: that is what is asked.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

REPOSITORY = Path(__file__).parents[2]
PIPELINE_TIMEOUT_S = 1100
EPOCHS = {"pretrain": 80, "sft": 40}
ONE_WORKER = {"num_workers": 1, "zero_stage": 0, "threads_per_worker": 2, "parallel_micro_batches": 2}
"""Starts sooner than the demo's two, which other tests run."""


def write_settings(user_data: Path, home: Path, port: int) -> Path:
    """The demo's settings with the user's files; test questions are the training captions."""
    photos = str(user_data / "photos")

    def source(name: str, split: str) -> dict[str, str]:
        return {"path": str(user_data / name), "image_root": photos, "split": split}

    settings = yaml.safe_load((REPOSITORY / "configs" / "tiny.yaml").read_text())
    captions, answers = "photos_pretrain.json", "photos_sft.json"
    settings["storage_path"] = str(home)
    settings["data"] = {
        "pretrain": [source(captions, "train")],
        "sft": [source(captions, "train"), source(answers, "train"), source(captions, "test")],
        "mpo": [source("photos_mmpr.jsonl", "train")],
    }
    settings["train"].update(ONE_WORKER)
    for stage, epochs in EPOCHS.items():
        settings["train"].setdefault(stage, {}).update(epochs=epochs, global_batch_size=8)
    settings["clip"]["epochs"] = 20
    settings["serve"] = {"port": port}
    settings.setdefault("cluster", {}).update(dashboard_port=port + 1, num_cpus=4)
    path = home / "photos.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_photos_go_through_every_stage_and_are_described(user_data: Path, tmp_path: Path, free_ports):
    path = write_settings(user_data, tmp_path, free_ports(2)[0])
    command = [sys.executable, "-m", "jobs.pipeline", "--config", str(path), "--no-sweep", "--ask"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True, timeout=PIPELINE_TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    [results] = (tmp_path / "evaluations").glob("mpo-*/results.json")
    caption = json.loads(results.read_text())["caption"]
    assert caption["n"] == 12  # six photos, in English and in Chinese
    assert caption["token_accuracy"] >= 0.9

    [samples] = (tmp_path / "datasets").glob("samples-*/summary.json")
    assert json.loads(samples.read_text())["bad"] == 0
    served = re.search(r"asked '(?P<question>.*?)': '(?P<reply>.*?)' \(truth: '(?P<truth>.*?)'\)", done.stdout)
    assert served is not None, done.stdout[-2000:]
    words = served["truth"].strip(".").split()
    assert sum(word in served["reply"] for word in words) >= 0.7 * len(words)
