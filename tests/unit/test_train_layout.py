"""The loop against the same training written out: one process, one sample at a time, no packing, no DeepSpeed.

Per step the loss within 1e-5 and the gradient norm within 1e-4 (relative), after nine steps every weight within 1e-4.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from minivlm.data.features import FeatureCache
from minivlm.data.tokens import IGNORE, EncodedSample, TokenTable
from minivlm.model.checkpoint import newest_complete
from minivlm.model.export import load_export
from minivlm.model.vlm import MiniVLM
from minivlm.train.feed import newest_step
from minivlm.train.job import StageJob, plan_training
from minivlm.train.metrics import METRICS_FILE, read_metrics
from tests.train_processes import NUM_SAMPLES, Group, changed, make_toy, run_job

LAYOUTS = [
    {"num_workers": 1, "zero_stage": 0},
    {"num_workers": 2, "zero_stage": 1, "micro_batch_tokens": 32},  # two micro-batches on each worker
    {"num_workers": 2, "zero_stage": 2, "pack_length_tokens": 8, "micro_batch_tokens": 64},
    {"num_workers": 3, "zero_stage": 3, "pack_length_tokens": 256},  # some workers have none
    {"num_workers": 2, "zero_stage": 0, "threads_per_worker": 2, "parallel_micro_batches": 2},
]
IDS = ["one worker", "two, accumulation, ZeRO-1", "two, other packing, ZeRO-2", "three, ZeRO-3", "two of two lanes"]
Losses = Callable[[StageJob, MiniVLM, tuple[int, ...]], Tensor]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> StageJob:
    return make_toy(tmp_path_factory.mktemp("toy"))


def answer_logps(job: StageJob, model: MiniVLM, sample: EncodedSample) -> Tensor:
    """[M] log-probabilities of the supervised tokens of one sample, alone in its row, by the stock language model."""
    features = FeatureCache.open(job.features_dir).get(sample.image_sha256)
    input_ids, labels = (torch.from_numpy(values.astype("int64")) for values in (sample.input_ids, sample.labels))
    inputs_embeds = model.embed(input_ids[None], features, torch.zeros(1, dtype=torch.int64))
    logps = model.language_model(inputs_embeds=inputs_embeds).logits[0, :-1].log_softmax(-1)
    supervised = labels[1:] != IGNORE
    return logps[supervised].gather(1, labels[1:][supervised, None])[:, 0]


def mean_of_tokens(job: StageJob, model: MiniVLM, units: tuple[int, ...]) -> Tensor:
    table = TokenTable.open(job.train_table)
    return -torch.cat([answer_logps(job, model, table[unit]) for unit in units]).mean()


class MeanOfPairs:
    """Mixed Preference Optimization written out, with the mean reward of all earlier steps as its shift."""

    def __init__(self) -> None:
        self.earlier: list[float] = []

    def __call__(self, job: StageJob, model: MiniVLM, units: tuple[int, ...]) -> Tensor:
        table, settings = TokenTable.open(job.train_table), job.config.train.mpo
        shift = sum(self.earlier) / len(self.earlier) if self.earlier else 0.0
        terms, rewards = [], []
        assert table.reference_logps is not None
        for unit in units:
            logps = [answer_logps(job, model, table[2 * unit + member]) for member in (0, 1)]
            chosen, rejected = (
                settings.beta * (values.sum() - float(table.reference_logps[2 * unit + member]))
                for member, values in enumerate(logps)
            )
            dpo = -logsigmoid(chosen - rejected)
            bco = -logsigmoid(chosen - shift) - logsigmoid(shift - rejected)
            terms.append(0.8 * dpo + 0.2 * bco - logps[0].mean())
            rewards += [chosen.item(), rejected.item()]
        self.earlier += rewards
        return torch.stack(terms).mean()


def train_plainly(job: StageJob, loss_of: Losses) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Losses and gradient norms of the steps, and the weights after them."""
    assert job.initial_export is not None
    model, settings = load_export(job.initial_export).vlm.train(), job.settings
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, settings.beta2))
    losses, norms = [], []
    for step, planned in enumerate(plan_training(job)):
        loss = loss_of(job, model, planned.units)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / job.total_steps))
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), torch.stack(norms), {name: p.detach() for name, p in model.named_parameters()}


def assert_same_training(job: StageJob, expected: tuple[Tensor, Tensor, dict[str, Tensor]]) -> None:
    assert run_job(job) == {}
    curve = read_metrics(job.run_dir / METRICS_FILE)
    losses, norms, weights = expected
    assert_close(torch.tensor([line["train/loss"] for line in curve]), losses, atol=1e-5, rtol=0)
    assert_close(torch.tensor([line["grad_norm"] for line in curve]), norms, atol=0, rtol=1e-4)
    found = newest_complete(job.run_dir)
    assert found is not None
    trained = dict(load_export(found / "export").vlm.named_parameters())
    assert_close(trained, weights, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def plain(toy: StageJob) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return train_plainly(toy, mean_of_tokens)


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_training_is_that_of_a_plain_loop_in_every_layout(
    toy: StageJob, plain: tuple[Tensor, Tensor, dict[str, Tensor]], tmp_path: Path, layout: dict[str, int]
):
    assert float(plain[0][-1]) < 0.9 * float(plain[0][0])
    assert float(plain[1].max()) > toy.settings.clip_norm  # some steps are clipped
    assert_same_training(changed(toy, tmp_path, **layout), plain)


def preferences(toy: StageJob, folder: Path, *, error: float) -> StageJob:
    """Each answer against the next one's, with reference values off by `error` nats."""
    assert toy.initial_export is not None
    table, model = TokenTable.open(toy.train_table), load_export(toy.initial_export).vlm
    entries = []
    for index in range(NUM_SAMPLES):
        chosen, other = table[index], table[(index + 1) % NUM_SAMPLES]
        entries += [chosen, replace(other, image_sha256=chosen.image_sha256)]
    with torch.no_grad():
        reference = [float(answer_logps(toy, model, entry).sum()) + error for entry in entries]
    TokenTable.write(folder, entries, group_size=2, reference_logps=reference)
    return replace(toy, stage="mpo", train_table=folder, val_table=None)


@pytest.fixture(scope="module")
def mpo(toy: StageJob, tmp_path_factory: pytest.TempPathFactory) -> StageJob:
    return preferences(toy, tmp_path_factory.mktemp("pairs") / "table", error=0.0)


@pytest.fixture(scope="module")
def plain_mpo(mpo: StageJob) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    losses = MeanOfPairs()
    expected = train_plainly(mpo, losses)
    assert abs(sum(losses.earlier) / len(losses.earlier)) > 1e-3  # the shift is no zero
    return expected


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=IDS[1:])
def test_mpo_and_its_shift_are_those_of_a_plain_loop_in_every_layout(
    mpo: StageJob, plain_mpo: tuple[Tensor, Tensor, dict[str, Tensor]], tmp_path: Path, layout: dict[str, int]
):
    assert_same_training(changed(mpo, tmp_path, **layout), plain_mpo)


def test_mpo_refuses_a_foreign_reference(toy: StageJob, tmp_path: Path):
    job = preferences(toy, tmp_path / "table", error=-5.0)
    assert "python -m jobs.preferences" in run_job(changed(job, tmp_path / "run"))["error"]


def test_a_step_without_a_label_ends_the_run(toy: StageJob, tmp_path: Path):
    table = TokenTable.open(toy.train_table)
    silent = [replace(table[index], labels=table[index].labels * 0 + IGNORE) for index in range(len(table))]
    TokenTable.write(tmp_path / "table", silent)
    job = replace(changed(toy, tmp_path / "run"), train_table=tmp_path / "table")
    error = run_job(job)["error"]
    assert "Step 1 of sft has no supervised token" in error
    assert "python -m jobs.prepare" in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": {"learning_rate": 1e30, "clip_norm": 1e30}}, "loss of sft is nan at step 6"),
        ({"stage": {"learning_rate": 1e39}, "checkpoint_every_steps": 5}, "is nan at step 5"),
    ],
    ids=["loss", "weights of a checkpoint"],
)
def test_divergence_ends_the_run_and_keeps_the_last_good_checkpoint(
    toy: StageJob, tmp_path: Path, settings: dict[str, object], message: str
):
    good = changed(toy, tmp_path)
    Group(good, hold=(1, 5)).kill_held()
    before = newest_complete(tmp_path)
    assert before is not None
    weights = load_file(before / "export" / "model.safetensors")
    error = run_job(changed(toy, tmp_path, **{"checkpoint_every_steps": 9, **settings}))["error"]
    assert message in error
    assert "train.sft.learning_rate=" in error
    assert newest_step(tmp_path) == 4
    assert newest_complete(tmp_path) == before
    assert_close(load_file(before / "export" / "model.safetensors"), weights, atol=0, rtol=0)
