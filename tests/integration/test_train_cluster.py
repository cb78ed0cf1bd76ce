"""The stages on a real two-worker cluster: they learn, and nothing is lost or done twice.

What needs no Ray is shown in plain processes: tests/unit/test_train_layout.py and test_train_resume.py.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from minivlm import layout
from minivlm.config import Config, ConfigError, load_config
from minivlm.data.collate import collate
from minivlm.data.features import FeatureCache
from minivlm.data.pipeline import build_tokens, prepare_tokenizer
from minivlm.data.tokens import TokenTable
from minivlm.inference.exports import stage_export
from minivlm.model.clip import build_clip, save_clip
from minivlm.model.export import load_export
from minivlm.model.vlm import sequence_logps
from minivlm.storage import write_json
from minivlm.train.launch import StageResult, check_resources, finish, finished_stage, make_job, run_stage
from minivlm.train.metrics import METRICS_FILE, SAMPLES_FILE, read_metrics
from minivlm.train.stages import TrainingError
from minivlm.workflow.steps import train
from tests.train_processes import run_job

pytestmark = pytest.mark.cluster

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange")
STEPS = 60
RUN_AGAIN = """
import sys, ray
from pathlib import Path
from minivlm.config import load_config
from minivlm.train.launch import run_stage
ray.init(address=sys.argv[1], log_to_driver=False)
run_stage(load_config(Path(sys.argv[2])), "pretrain")
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    context = ray.init(num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()


def write_toy(folder: Path) -> None:
    """24 one-coloured pictures with a caption and a question each; a tower with random weights."""
    rows: dict[str, list[dict[str, object]]] = {"pretrain": [], "sft": []}
    for index in range(24):
        colour, name = COLOURS[index % len(COLOURS)], f"{index:02d}.png"
        picture = Image.new("RGB", (32, 32), colour)
        picture.putpixel((index, 0), (1, 2, 3))
        picture.save(folder / name)
        split = "val" if index >= 20 else "train"
        for stage, question in (("pretrain", "Describe it."), ("sft", "Which colour?")):
            answer = f"a {colour} square" if stage == "pretrain" else colour
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            rows[stage].append({"id": f"{stage}{index}", "image": name, "conversations": turns, "split": split})
    for stage, values in rows.items():
        (folder / f"{stage}.json").write_text(json.dumps(values))
    clip = build_clip(
        image_size=16, patch_size=8, vision_hidden_size=16, vision_layers=1, vision_heads=2, text_hidden_size=16,
        text_layers=1, text_heads=2, max_text_tokens=16, projection_dim=8, vocab_size=300, bos_token_id=1,
        eos_token_id=0, pad_token_id=0, seed=0,
    )  # fmt: skip
    save_clip(clip, folder / "clip")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of seconds, as the file that a user would write."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    language = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    stage = {"global_batch_size": 8, "epochs": STEPS // 3, "learning_rate": 1e-2, "num_evals": 2}
    still = {**stage, "epochs": 1, "learning_rate": 1e-12}
    tree = {
        "storage_path": str(folder / "home"),
        "data": {name: [{"path": str(folder / f"{name}.json")}] for name in ("pretrain", "sft")},
        "tokenizer": {"vocab_size": 300},
        "clip": {"path": str(folder / "clip"), "encode_batch_size": 8},
        "model": {"language_model": {**language, "head_dim": 16, "intermediate_size": 64}},
        "train": {
            "checkpoint_every_steps": 10,
            "pretrain": stage,
            "sft": still,
            "mpo": {"global_batch_size": 4, "epochs": 6, "learning_rate": 3e-3},
        },
    }
    path = folder / "toy.yaml"
    path.write_text(json.dumps(tree))
    return path


def losses(result: StageResult) -> list[float]:
    return [line["train/loss"] for line in read_metrics(result.run_dir / METRICS_FILE)]


def weights(result: StageResult) -> dict[str, torch.Tensor]:
    return load_file(result.export_dir / "model.safetensors")


@pytest.fixture(scope="module")
def pretrained(cluster: str, settings: Path) -> tuple[Config, StageResult]:
    """The uninterrupted run that others are compared with."""
    config = load_config(settings)
    prepare_tokenizer(config)
    return config, run_stage(config, "pretrain")


def elsewhere(settings: Path, name: str, *overrides: str) -> Config:
    """The same data and settings with runs of their own (samples and features are shared by a link)."""
    config = load_config(settings, overrides)
    home = config.root.with_name(name)
    home.mkdir()
    for folder in ("datasets", "tokenizers", "features"):
        (home / folder).symlink_to(config.root / folder)
    return config.model_copy(update={"storage_path": home})


def wait_for_steps(run_dir: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(run_dir / METRICS_FILE)) < count:
        assert time.monotonic() < deadline, f"no {count} steps in {run_dir}"
        time.sleep(0.02)


def test_a_stage_learns_and_is_validated(pretrained: tuple[Config, StageResult]):
    result = pretrained[1]
    curve = losses(result)
    assert len(curve) == result.steps == STEPS
    assert curve[-1] < 0.5 * curve[0]
    assert result.val_loss is not None
    assert result.val_loss < 0.5 * curve[0]


def test_sft_starts_from_the_pretrained_weights(pretrained: tuple[Config, StageResult]):
    config, before = pretrained
    after = run_stage(config, "sft")  # at a rate that moves nothing
    assert len(losses(after)) == 3
    assert_close(weights(after), weights(before), atol=1e-6, rtol=0)
    assert finished_stage(config, "sft") == after


def write_pairs(config: Config) -> None:
    """Each SFT answer against another colour's, with its reference values."""
    export = load_export(finished_stage(config, "sft").export_dir)
    table, cache = TokenTable.open(build_tokens(config, "sft", "train")), FeatureCache.open(next_cache(config))
    entries = [table[index] for pair in range(len(table)) for index in (pair, (pair + 1) % len(table))]
    pairs = [
        replace(answer, image_sha256=entries[index - index % 2].image_sha256) for index, answer in enumerate(entries)
    ]
    folder = layout.pairs_dir(config) / "tokens"
    plain = TokenTable.write(folder.with_name("plain"), pairs)
    rows = [(index,) for index in range(len(plain))]
    batch = collate(plain, rows, cache.get, image_token_id=export.image_token_id, pad_token_id=0)
    with torch.inference_mode():
        logps = sequence_logps(export.vlm(batch), len(rows))
    TokenTable.write(folder, pairs, group_size=2, reference_logps=logps.tolist())
    write_json(folder.with_name("reference.json"), {"reference": stage_export(config, "sft").reference})


def next_cache(config: Config) -> Path:
    return next(path for path in layout.features_root(config).iterdir() if path.is_dir())


def test_mpo_starts_where_policy_is_reference_and_widens_the_margin(
    pretrained: tuple[Config, StageResult], settings: Path
):
    config = load_config(settings, ["train.sample_every_steps=20", "evaluation.max_new_tokens=4"])
    run_stage(config, "sft")
    write_pairs(config)
    result = train(config, "mpo")
    curve = read_metrics(result.run_dir / METRICS_FILE)
    samples = read_metrics(result.run_dir / SAMPLES_FILE)
    assert [line["step"] for line in samples] == [step for step in (20, result.steps) for _ in range(4)]
    assert {line["truth"] for line in samples} <= set(COLOURS)  # the validation questions of sft
    [panel] = layout.mlflow_dir(config).rglob("panels/samples.json")
    assert json.loads(panel.read_text())["rows"] == samples
    assert curve[0]["train/loss"] == pytest.approx(1.2 * math.log(2) + curve[0]["train/loss/sft"], abs=1e-3)
    assert curve[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-3)
    assert curve[-1]["rewards/margins"] > 0.05
    policy = finished_stage(config, "mpo").export_dir
    again = config.model_copy(
        update={"preferences": config.preferences.model_copy(update={"policy": policy})}
    )  # a second round starts from the first one's weights, and wants its reference values
    write_pairs(again)
    with pytest.raises(ConfigError, match="wrong reference"):
        make_job(again, "mpo")
    write_json(layout.pairs_dir(again) / "reference.json", {"reference": stage_export(config, "mpo").reference})
    assert make_job(again, "mpo").initial_export == policy


def test_a_finished_stage_is_not_run_again(pretrained: tuple[Config, StageResult]):
    config, before = pretrained
    written = (before.run_dir / METRICS_FILE).stat().st_mtime_ns
    assert run_stage(config, "pretrain") == before
    assert (before.run_dir / METRICS_FILE).stat().st_mtime_ns == written


def kill_a_worker() -> None:
    children = psutil.Process().children(recursive=True)
    os.kill(next(child.pid for child in children if "RayTrainWorker" in child.name()), signal.SIGKILL)


def test_killing_a_worker_then_driver_and_worker_and_typing_the_same_again_gives_the_same_weights(
    cluster: str, pretrained: tuple[Config, StageResult], settings: Path, tmp_path: Path
):
    config = elsewhere(settings, "killed")
    file = tmp_path / "killed.yaml"
    file.write_text(json.dumps({**json.loads(settings.read_text()), "storage_path": str(config.root)}))
    run_dir = layout.run_dir(config, "pretrain")
    driver = subprocess.Popen([sys.executable, "-c", RUN_AGAIN, cluster, str(file)])
    wait_for_steps(run_dir, 15)
    kill_a_worker()  # is replaced within the run, which goes on after step 10
    wait_for_steps(run_dir, 35)
    assert driver.poll() is None
    kill_a_worker()
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (run_dir / "result.json").exists()
    result = run_stage(config, "pretrain")
    assert losses(result) == losses(pretrained[1])
    assert_close(weights(result), weights(pretrained[1]), atol=0, rtol=0)


def test_a_streamed_stage_ends_with_the_weights_of_a_cached_one_and_encodes_each_picture_once(
    pretrained: tuple[Config, StageResult], settings: Path
):
    short = ("train.sft.epochs=2", "train.sft.learning_rate=1e-2")
    job = make_job(load_config(settings, short), "sft")
    assert run_job(job) == {}  # plain processes on the cached features
    cached = finish(job)
    config = elsewhere(settings, "streamed", *short, "data.features=stream", "clip.cpus_per_encoder=0.5")
    (config.root / "runs").mkdir()
    (config.root / "runs" / pretrained[1].run_dir.name).symlink_to(pretrained[1].run_dir)
    (config.root / "features").unlink()  # nothing is encoded yet
    streamed = run_stage(config, "sft")
    assert losses(streamed) == losses(cached)
    assert_close(weights(streamed), weights(cached), atol=0, rtol=0)
    stat = FeatureCache.open(next_cache(config)).stat()
    assert (stat.distinct, stat.encoded) == (24, 24)


def test_a_missing_earlier_stage_is_named(pretrained: tuple[Config, StageResult], settings: Path):
    with pytest.raises(TrainingError, match=r"No finished pretrain run.*python -m jobs\.train pretrain"):
        run_stage(elsewhere(settings, "empty"), "sft")


def test_a_placement_that_cannot_start_is_refused(cluster: str, settings: Path):
    with pytest.raises(ConfigError, match=r"train\.cpus_per_worker=1\.5"):
        check_resources(load_config(settings, ["train.cpus_per_worker=2"]))
    with pytest.raises(ConfigError, match=r"train\.use_gpu=false"):
        check_resources(load_config(settings, ["train.use_gpu=true"]))
