"""What learns, what is frozen, adapters and their merge: one stage's loop on one rank, without a cluster."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from minivlm.config.train import LoraConfig
from minivlm.data.collate import collate
from minivlm.data.features import FeatureCache
from minivlm.data.tokens import TokenTable
from minivlm.model.checkpoint import checkpoint_dir, verify_manifest, write_manifest
from minivlm.model.export import load_export
from minivlm.model.lora import adapted_layers, count_adapters
from minivlm.model.vlm import MiniVLM, sequence_logps
from minivlm.train.initial import choose_learning, exported_model, initial_model, prepare_model
from minivlm.train.job import StageJob
from minivlm.train.metrics import METRICS_FILE, read_metrics
from minivlm.train.stages import TrainingError
from tests.tiny_stage import interrupted, run, stage_job, tiny_parts

__all__ = ["tiny_parts"]
pytestmark = pytest.mark.usefixtures("one_rank")
CPU = torch.device("cpu")
LORA = {"rank": 4, "alpha": 8}


def weights(model: MiniVLM) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def exported(checkpoint: Path) -> dict[str, Tensor]:
    return weights(load_export(checkpoint / "export").vlm)


def first_batch(job: StageJob) -> dict[str, Tensor]:
    table, features = TokenTable.open(job.train_table), FeatureCache.open(job.features_dir)
    return collate(table, [[0], [1, 2]], features.get, image_token_id=job.image_token_id, pad_token_id=0)


def is_edge(name: str) -> bool:
    return name.startswith(("projector.", "language_model.model.layers.0.", "language_model.model.layers.2."))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("parts", "learns"),
    [
        (["projector"], lambda name: name.startswith("projector.")),
        (["language_model"], lambda name: name.startswith("language_model.")),
        (["projector", "language_model.edges"], is_edge),
        (["projector", "language_model"], lambda name: True),
    ],
    ids=["projector", "language_model", "edges", "all"],
)
def test_exactly_the_listed_parts_change(tiny_parts: Path, tmp_path: Path, parts: list[str], learns: Any, tied: bool):
    job = stage_job(tiny_parts, tmp_path / "run", {"trainable": parts})
    language = job.config.model.language_model.model_copy(update={"tie_word_embeddings": tied})
    model = job.config.model.model_copy(update={"language_model": language})
    object.__setattr__(job, "config", job.config.model_copy(update={"model": model}))
    before = weights(initial_model(job))
    _, checkpoint = run(job)
    after = exported(checkpoint)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if learns(name)}
    assert ("language_model.lm_head.weight" in before) is not tied


def test_edges_that_meet_are_refused(tiny_parts: Path, tmp_path: Path):
    model = initial_model(stage_job(tiny_parts, tmp_path))
    with pytest.raises(ValueError, match="edge_layers=2 at each end are all of the 3 layers"):
        choose_learning(model, ["language_model.edges"], 2)


def test_adapters_start_as_the_model_and_merge_to_what_they_compute(tiny_parts: Path, tmp_path: Path):
    job = stage_job(tiny_parts, tmp_path, {"lora": LORA})
    base, model = initial_model(job), initial_model(job)
    prepare_model(model, job, CPU)
    batch = first_batch(job)
    assert torch.equal(model(batch).logps, base(batch).logps)
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, parameter in learning.items():
            parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    untouched = weights(base)
    merged = exported_model(base, learning, LoraConfig.model_validate(LORA))
    assert set(weights(merged)) == set(untouched)
    assert_close(merged(batch).logps, model(batch).logps, atol=2e-5, rtol=0)
    assert not torch.allclose(merged(batch).logps, base(batch).logps, atol=0.1)
    assert_close(weights(base), untouched, atol=0, rtol=0)


@pytest.mark.parametrize("parts", [["projector", "language_model"], ["language_model"]], ids=["both", "adapters"])
def test_a_stage_with_adapters_exports_the_merged_model(tiny_parts: Path, tmp_path: Path, parts: list[str]):
    lora = {**LORA, "targets": ["q_proj", "down_proj"]}
    job = stage_job(tiny_parts, tmp_path / "run", {"trainable": parts, "lora": lora}, checkpoint_every_steps=1)
    before = weights(initial_model(job))
    _, checkpoint = run(job)
    after = exported(checkpoint)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kept = ("q_proj.weight", "down_proj.weight", *(["projector"] if "projector" in parts else []))
    assert changed == {name for name in before if name.endswith(kept) or name.startswith(kept)}
    base_bytes = sum(weight.numel() * 4 for name, weight in before.items() if name.startswith("language_model"))
    state_bytes = sum(path.stat().st_size for path in (checkpoint / "engine").rglob("*") if path.is_file())
    assert 3 * 4 * 1920 < state_bytes < base_bytes  # weights and two moments of 1,920 adapter parameters at least


def test_the_count_of_adapters_is_that_of_peft(tiny_parts: Path, tmp_path: Path):
    job = stage_job(tiny_parts, tmp_path, {"trainable": ["language_model"], "lora": LORA})
    model = initial_model(job)
    expected = count_adapters(model.language_model, job.settings.lora.targets, 4)
    assert expected == 3 * 4 * (4 * 64 + 3 * 96)  # four 32 x 32 and three 32 x 64 matrices in each of three layers
    prepare_model(model, job, CPU)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_a_target_that_does_not_exist_names_those_that_do(tiny_parts: Path, tmp_path: Path):
    job = stage_job(tiny_parts, tmp_path / "run", {"lora": {"targets": ["q_proj", "lm_head"]}})
    outcome, _ = run(job)
    assert outcome["error"].startswith("train.pretrain.lora.targets: no linear layer `lm_head`")
    assert "down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj" in outcome["error"]
    assert len(adapted_layers(initial_model(job).language_model, ["q_proj"])) == 3


def test_four_bit_weights_on_a_cpu_are_one_clear_error(tiny_parts: Path, tmp_path: Path):
    job = stage_job(tiny_parts, tmp_path, {"lora": {"quantization": "nf4"}}, use_gpu=True)
    with pytest.raises(TrainingError, match=r"train\.pretrain\.lora\.quantization: 4-bit weights need CUDA"):
        prepare_model(initial_model(job), job, CPU)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is there")
def test_four_bit_weights_without_bitsandbytes_say_what_to_install(tiny_parts: Path, tmp_path: Path):
    job = stage_job(tiny_parts, tmp_path, {"lora": {"quantization": "nf4"}}, use_gpu=True)
    with pytest.raises(TrainingError, match=r"lora\.quantization: .*pip install bitsandbytes, or type none"):
        prepare_model(initial_model(job), job, torch.device("cuda"))


DROPOUT = {"attention_dropout": 0.1, "label_smoothing": 0.1}


@pytest.mark.parametrize(
    ("stage", "train"),
    [
        (DROPOUT, {"zero_stage": 2}),
        ({**DROPOUT, "lora": {**LORA, "dropout": 0.2}}, {"zero_stage": 2}),
        (
            {**DROPOUT, "lora": {**LORA, "dropout": 0.2, "targets": ["q_proj", "down_proj"]}},
            {"zero_stage": 3, "gradient_checkpointing": True, "micro_batch_tokens": 80},  # ZeRO-3 is slow per module
        ),
        ({"lora": LORA}, {"zero_stage": 0}),
    ],
    ids=["dropout", "lora", "lora-zero3-checkpointing", "lora-zero0"],
)
def test_resume_equals_uninterrupted(tiny_parts: Path, tmp_path: Path, stage: dict[str, Any], train: dict[str, Any]):
    train = {"checkpoint_every_steps": 2, "micro_batch_tokens": 40, **train}
    whole = run(stage_job(tiny_parts, tmp_path / "whole", stage, **train))[1]
    halves = run(interrupted(stage_job(tiny_parts, tmp_path / "halves", stage, **train), after=2))[1]
    assert_close(exported(halves), exported(whole), atol=0, rtol=0)


def keep_old_format(folder: Path) -> None:
    for path in (folder / "engine").iterdir():
        path.rename(path.with_name("zero_pp_rank_0_mp_rank_00_optim_states.pt"))


def drop_first_element(folder: Path) -> None:
    path = folder / "engine" / "rank=00000.safetensors"
    states = load_file(path)
    label = next(label for label in states if "/exp_avg/" in label)
    values = states.pop(label)
    save_file({**states, f"{label.rpartition('/')[0]}/1": values[1:]}, path)


@pytest.mark.parametrize(
    ("spoil", "kept", "message"),
    [
        (keep_old_format, ("step", "client_state"), "No training state of this version"),
        (drop_first_element, ("step", "client_state"), "holds elements 0 to 0 of"),
        (lambda folder: None, ("step",), "has no reward shift"),
    ],
    ids=["older format", "gap", "manifest"],
)
def test_state_that_cannot_be_resumed_ends_the_run_with_what_to_delete(
    tiny_parts: Path, tmp_path: Path, spoil: Any, kept: tuple[str, ...], message: str
):
    job = interrupted(stage_job(tiny_parts, tmp_path / "run", checkpoint_every_steps=1), after=1)
    folder = checkpoint_dir(job.run_dir, 1)
    manifest = verify_manifest(folder)
    spoil(folder)
    write_manifest(folder, {key: manifest[key] for key in kept})
    outcome, _ = run(job)
    assert message in outcome["error"]
    assert "elete " in outcome["error"]


def test_dropout_is_of_training_only(tiny_parts: Path, tmp_path: Path):
    job = stage_job(tiny_parts, tmp_path, DROPOUT)
    model, batch = initial_model(job), first_batch(job)
    expected = model.eval()(batch).logps
    prepare_model(model, job, CPU)
    assert torch.equal(model.eval()(batch).logps, expected)
    assert not torch.equal(model.train()(batch).logps, expected)
    assert model.language_model.config.attention_dropout == 0.0


def test_label_smoothing_leaves_the_validation_loss_alone(tiny_parts: Path, tmp_path: Path):
    lines = []
    for smoothing in (0.0, 0.5):
        stage = {"learning_rate": 1e-12, "label_smoothing": smoothing}
        job = stage_job(tiny_parts, tmp_path / str(smoothing), stage)
        run(job)
        lines.append(read_metrics(job.run_dir / METRICS_FILE)[-1])
    assert lines[0]["val/loss"] == pytest.approx(lines[1]["val/loss"], abs=1e-6)
    assert abs(lines[0]["train/loss"] - lines[1]["train/loss"]) > 1e-3


@pytest.mark.parametrize(
    ("stage", "zero_stage"),
    [
        ({}, 2),
        ({"trainable": ["projector"]}, 2),
        ({"trainable": ["projector"]}, 3),
        ({"trainable": ["projector", "language_model.edges"]}, 3),
    ],
    ids=["all", "projector", "projector-zero3", "edges-zero3"],
)
def test_checkpointed_layers_give_the_same_weights(
    tiny_parts: Path, tmp_path: Path, stage: dict[str, Any], zero_stage: int
):
    kept, again = (
        exported(run(stage_job(tiny_parts, tmp_path / str(is_on), stage, zero_stage=zero_stage,
                               gradient_checkpointing=is_on, micro_batch_tokens=40))[1])
        for is_on in (False, True)
    )  # fmt: skip
    assert_close(again, kept, atol=0, rtol=0)


def test_compiling_without_a_compiler_says_what_to_install(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CXX", "no-such-compiler")
    job = stage_job(tiny_parts, tmp_path, compile=True)
    with pytest.raises(TrainingError, match=r"train\.compile: .* install them, or type train\.compile=false"):
        prepare_model(initial_model(job), job, CPU)


def test_checkpointed_layers_run_twice(tiny_parts: Path, tmp_path: Path):
    job = stage_job(tiny_parts, tmp_path, {"trainable": ["projector"]}, gradient_checkpointing=True)
    model, calls = initial_model(job).train(), []
    prepare_model(model, job, CPU)
    model.language_model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model(first_batch(job)).logps.sum().backward()
    assert len(calls) == 2
    assert model.language_model.model.embed_tokens.weight.grad is None


def test_mpo_with_adapters_starts_at_its_reference(tiny_parts: Path, tmp_path: Path):
    job = stage_job(tiny_parts, tmp_path / "sft")
    export = run(job)[1] / "export"
    samples = [TokenTable.open(job.train_table)[index] for index in range(8)]
    features = FeatureCache.open(job.features_dir)
    ids = {"image_token_id": job.image_token_id, "pad_token_id": 0}
    scored = collate(TokenTable.open(job.train_table), [[index] for index in range(8)], features.get, **ids)
    with torch.no_grad():
        reference = sequence_logps(load_export(export).vlm(scored), 8)
    TokenTable.write(tmp_path / "pairs", samples, group_size=2, reference_logps=reference.tolist())
    settings = {"global_batch_size": 2, "learning_rate": 1e-2, "lora": LORA}
    mpo = stage_job(tiny_parts, tmp_path / "mpo", mpo=settings, gradient_checkpointing=True, zero_stage=3)
    changes = {"stage": "mpo", "train_table": tmp_path / "pairs", "val_table": None, "total_steps": 2}
    mpo = StageJob(**{**vars(mpo), **changes, "initial_export": export})
    outcome, checkpoint = run(mpo)
    assert outcome == {}
    curve = read_metrics(mpo.run_dir / METRICS_FILE)
    assert curve[0]["train/loss/dpo"] == pytest.approx(0.693147, abs=1e-5)
    assert curve[1]["train/loss/dpo"] != pytest.approx(0.693147, abs=1e-5)
    before, after = (weights(load_export(folder).vlm) for folder in (export, checkpoint / "export"))
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed
    assert all(".layers." in name or name.startswith("projector") for name in changed)
