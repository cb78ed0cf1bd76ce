"""While a stage trains: samples change nothing, its export is read again, MPO's shift outlives a kill."""

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from minivlm.config import ConfigError
from minivlm.data.collate import collate
from minivlm.data.features import FeatureCache
from minivlm.data.tokens import IGNORE, EncodedSample, TokenTable
from minivlm.model.checkpoint import MANIFEST, CheckpointError
from minivlm.model.export import load_export
from minivlm.model.fast_layers import use_segment_attention
from minivlm.model.generate import Prompt, generate
from minivlm.model.vlm import cast_weights, sequence_logps
from minivlm.train import loop
from minivlm.train.job import StageJob, sampled_entries, sampled_pictures
from minivlm.train.metrics import METRICS_FILE, SAMPLES_FILE, read_metrics
from minivlm.train.reload import check_reload, probe_batch, probe_logits
from minivlm.train.samples import first_question, repetition_rate
from tests.tiny_stage import NUM_SAMPLES, interrupted, planned_rows, run, stage_job, tiny_parts

__all__ = ["tiny_parts"]
pytestmark = pytest.mark.usefixtures("one_rank")
DROPOUT = {"lora": {"rank": 2, "alpha": 4, "dropout": 0.3}}
NUM_NEW_TOKENS = 12


def sampling_job(parts: Path, run_dir: Path, every: int, stage: dict[str, Any] | None = None, **train: Any) -> StageJob:
    job = stage_job(parts, run_dir, stage, sample_every_steps=every, **train)
    evaluation = job.config.evaluation.model_copy(update={"max_new_tokens": NUM_NEW_TOKENS})
    return replace(job, config=job.config.model_copy(update={"evaluation": evaluation}))


def curve(job: StageJob) -> list[dict[str, float]]:
    """What does not depend on the clock."""
    lines = read_metrics(job.run_dir / METRICS_FILE)
    return [{name: line[name] for name in line if name not in ("tokens_per_s", "data_wait_s")} for line in lines]


def exported(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "export" / "model.safetensors")


def test_samples_change_no_bit_of_training_and_a_resumed_run_writes_the_same(tiny_parts: Path, tmp_path: Path):
    silent, whole, killed = (
        sampling_job(tiny_parts, tmp_path / name, every, DROPOUT, zero_stage=2, checkpoint_every_steps=1)
        for name, every in (("silent", 0), ("whole", 2), ("killed", 2))
    )
    (first, expected), (second, sampled) = run(silent), run(whole)
    third, resumed = run(interrupted(killed, after=2))
    assert first == second == third == {}
    assert_close(exported(sampled), exported(expected), atol=0, rtol=0)
    assert_close(exported(resumed), exported(expected), atol=0, rtol=0)
    plain = [{name: line[name] for name in line if not name.startswith("samples/")} for line in curve(whole)]
    assert plain == curve(silent)
    assert curve(killed) == curve(whole)
    samples = read_metrics(whole.run_dir / SAMPLES_FILE)
    assert [line["step"] for line in samples] == [2] * 8 + [3] * 8  # every two steps, and at the end
    assert read_metrics(killed.run_dir / SAMPLES_FILE) == samples
    assert not (silent.run_dir / SAMPLES_FILE).exists()


def test_samples_are_the_greedy_answers_of_the_exported_model(tiny_parts: Path, tmp_path: Path):
    job = sampling_job(tiny_parts, tmp_path, 100, zero_stage=3)
    _, checkpoint = run(job)
    export, table = load_export(checkpoint / "export"), TokenTable.open(job.val_table or Path())
    features = FeatureCache.open(job.features_dir)
    rows = [table[entry] for entry in sampled_entries(table)]
    assert [row.sample_id for row in rows] == ["s0", "s1", "s3", "s4", "s6", "s7", "s9", "s10"]
    prompts = [Prompt(row.input_ids[row.labels == IGNORE].tolist(), features.get(row.image_sha256)) for row in rows]
    answers = generate(
        export.vlm, prompts, max_new_tokens=NUM_NEW_TOKENS, eos_token_id=int(export.tokenizer.eos_token_id)
    )
    assert json.loads((checkpoint / MANIFEST).read_text())["reload_difference"] == 0.0
    lines = read_metrics(tmp_path / SAMPLES_FILE)
    assert [line["sample"] for line in lines] == [row.sample_id for row in rows]
    texts = [export.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
    assert [line["answer"] for line in lines] == texts
    assert [line["num_tokens"] for line in lines] == [len(answer) for answer in answers]
    last = curve(job)[-1]
    assert last["samples/length"] == pytest.approx(np.mean([len(answer) for answer in answers]))
    assert last["samples/repetition"] == pytest.approx(np.mean([line["repetition"] for line in lines]))


def test_repetition_is_the_share_of_four_grams_seen_before():
    assert repetition_rate([1, 2, 3, 4, 5, 6, 7]) == 0.0
    assert repetition_rate([1, 2, 3]) == 0.0
    assert repetition_rate([7] * 8) == pytest.approx(4 / 5)  # five 4-grams, one of them new
    assert repetition_rate([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_a_question_ends_where_the_first_answer_begins_and_shows_its_own_pictures():
    image, end = 9, 5
    ids = np.array([image, image, 1, 2, 20, 21, end, image, image, 3, 22, end], np.int32)
    is_answer = np.isin(ids, (20, 21, 22, end))
    sample = EncodedSample("two", ids, np.where(is_answer, ids, IGNORE), ("a" * 64, "b" * 64))
    question = first_question(sample, image)
    assert (question.input_ids, question.truth) == ([image, image, 1, 2], [20, 21])
    assert question.pictures == ("a" * 64,)


def test_samples_without_validation_rows_are_refused(tiny_parts: Path, tmp_path: Path):
    job = sampling_job(tiny_parts, tmp_path, 5)
    with pytest.raises(ConfigError, match=r"data\.sft has none: type train\.sample_every_steps=0"):
        sampled_pictures(job.config, "mpo", None)
    assert sampled_pictures(stage_job(tiny_parts, tmp_path).config, "mpo", None) == set()


@pytest.mark.parametrize(
    ("zero_stage", "precision", "stage", "largest"),
    [
        (0, "float32", {}, 0.0),
        (2, "float32", {}, 0.0),
        (2, "bfloat16", {}, 0.05),
        (2, "float32", {"lora": {"rank": 2, "alpha": 4}}, 1e-4),
    ],
)
def test_the_last_export_gives_the_logits_of_the_trained_model(
    tiny_parts: Path, tmp_path: Path, zero_stage: int, precision: str, stage: dict[str, Any], largest: float
):
    _, checkpoint = run(stage_job(tiny_parts, tmp_path, stage, zero_stage=zero_stage, precision=precision))
    assert json.loads((checkpoint / MANIFEST).read_text())["reload_difference"] <= largest


def test_a_damaged_export_fails_the_stage_and_the_checkpoint_before_it_stays(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = loop.save_export

    def write_on_a_bad_disk(directory: Path, *arguments: Any, **settings: Any) -> None:
        write(directory, *arguments, **settings)
        flip_a_bit(directory)

    job = stage_job(tiny_parts, tmp_path / "run", zero_stage=2, checkpoint_every_steps=2)
    interrupted(job, after=2)
    monkeypatch.setattr(loop, "save_export", write_on_a_bad_disk)
    outcome, newest = run(job)
    assert "The export of pretrain is not the model that was trained" in outcome["error"]
    assert "down_proj.weight is not read as it was written" in outcome["error"]
    assert newest.name == "step=00000002"


def flip_a_bit(export: Path, name: str = "language_model.model.layers.0.mlp.down_proj.weight") -> None:
    weights = load_file(export / "model.safetensors")
    weights[name].view(torch.int32)[3, 5] ^= 1
    save_file(weights, export / "model.safetensors", metadata={"format": "pt"})


def test_another_models_logits_are_told_apart(tiny_parts: Path, tmp_path: Path):
    job = replace(stage_job(tiny_parts, tmp_path), initial_export=tiny_parts / "export")
    vlm, batch = load_export(tiny_parts / "export").vlm, probe_batch(job)
    use_segment_attention(vlm)
    logits = probe_logits(vlm, vlm, batch)
    assert logits.shape[0] == int((batch["segment_ids"] != 0)[:, 1:].sum())
    settings = {"precision": "float32", "is_rounded": False}
    assert check_reload(tiny_parts / "export", vlm, logits, batch, **settings) == 0.0
    logits[0, 0] += 1e-3 * float(logits.abs().max())
    with pytest.raises(CheckpointError, match="logits differ by"):
        check_reload(tiny_parts / "export", vlm, logits, batch, **settings)


def test_the_export_is_compared_under_the_attention_that_trained_it(tiny_parts: Path, tmp_path: Path):
    job = replace(stage_job(tiny_parts, tmp_path), initial_export=tiny_parts / "export")
    written, live = (load_export(tiny_parts / "export").vlm for _ in range(2))
    cast_weights(live, torch.bfloat16)
    batch = probe_batch(job)
    fused = probe_logits(live, live, batch)
    use_segment_attention(live)
    logits = probe_logits(live, live, batch)
    assert not torch.equal(logits, fused)
    settings = {"precision": "bfloat16", "is_rounded": False}
    assert check_reload(tiny_parts / "export", written, logits, batch, **settings) == 0.0


def preference_job(parts: Path, run_dir: Path, **stage: Any) -> StageJob:
    """Each answer of the toy against the next one's, from the small export on."""
    table, vlm = TokenTable.open(parts / "table"), load_export(parts / "export").vlm
    entries = [
        replace(table[(index + member) % NUM_SAMPLES], image_sha256=table[index].image_sha256)
        for index in range(NUM_SAMPLES)
        for member in (0, 1)
    ]
    job = stage_job(parts, run_dir)
    ids = {"image_token_id": job.image_token_id, "pad_token_id": job.pad_token_id}
    if not (parts / "pairs").exists():
        plain = TokenTable.write(parts / "pairs-plain", entries)
        rows = tuple((index,) for index in range(len(entries)))
        batch = collate(plain, rows, FeatureCache.open(job.features_dir).get, **ids)
        with torch.no_grad():
            reference = sequence_logps(vlm(batch), len(entries)).tolist()
        TokenTable.write(parts / "pairs", entries, group_size=2, reference_logps=reference)
    settings = {**job.config.train.pretrain.model_dump(), **stage}
    mpo = type(job.config.train.mpo).model_validate(settings)
    train = job.config.train.model_copy(update={"mpo": mpo, "checkpoint_every_steps": 1})
    config = job.config.model_copy(update={"train": train})
    where = {"train_table": parts / "pairs", "val_table": None, "initial_export": parts / "export"}
    return replace(job, stage="mpo", config=config, **where)


def test_the_shift_is_saved_and_validation_does_not_move_it(tiny_parts: Path, tmp_path: Path):
    whole = preference_job(tiny_parts, tmp_path / "whole")
    outcome, expected = run(whole)
    assert outcome == {}
    validated = preference_job(tiny_parts, tmp_path / "validated", num_evals=3)
    validated = interrupted(replace(validated, val_table=tiny_parts / "pairs"), after=2)
    outcome, found = run(validated)
    assert outcome == {}
    shifts = [json.loads((path / MANIFEST).read_text())["client_state"]["reward_shift"] for path in (expected, found)]
    assert shifts[0] == shifts[1]
    assert shifts[0]["reward_count"] == 2 * NUM_SAMPLES
    rewards = [line["rewards/chosen"] + line["rewards/rejected"] for line in curve(whole)]
    assert shifts[0]["reward_sum"] == pytest.approx(4 * sum(rewards))  # four pairs per step
    assert abs(shifts[0]["reward_sum"]) > 1e-3
    lines = curve(validated)
    assert all("val/loss" in line for line in lines)
    assert [{name: line[name] for name in line if name != "val/loss"} for line in lines] == curve(whole)
    assert_close(exported(found), exported(expected), atol=0, rtol=0)


def test_sft_on_chosen_alone_starts_and_logs_rewards(tiny_parts: Path, tmp_path: Path):
    job = preference_job(tiny_parts, tmp_path, dpo_weight=0.0, bco_weight=0.0)
    outcome, _ = run(job)
    lines = curve(job)
    assert outcome == {}
    assert [line["train/loss"] for line in lines] == [line["train/loss/sft"] for line in lines]
    assert lines[0]["train/loss/dpo"] == pytest.approx(np.log(2), abs=1e-4)
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert lines[-1]["rewards/chosen"] > 0 < lines[-1]["kl"]


def test_the_garbage_collector_passes_over_what_libraries_hold_while_a_stage_runs(tiny_parts: Path, tmp_path: Path):
    """Else it stops all lanes for half a second now and then. After the stage, or its end by an error, it sees all."""
    job, seen = stage_job(tiny_parts, tmp_path / "run"), []
    job.run_dir.mkdir()

    def rows() -> Iterator[dict[str, Any]]:
        for row in planned_rows(job, 0):
            seen.append(gc.get_freeze_count())
            yield row

    loop.train_loop(job, rows(), torch.device("cpu"), lambda metrics, checkpoint: None)
    assert seen[0] < 1000
    assert seen[-1] > 10_000
    assert gc.get_freeze_count() == 0
    interrupted(stage_job(tiny_parts, tmp_path / "again"), after=2)
    assert gc.get_freeze_count() == 0
