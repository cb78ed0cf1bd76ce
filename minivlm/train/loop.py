"""The training loop of every stage, as it runs in each process of a group: a Ray Train worker, or a trial alone.

One optimizer step: read this rank's micro-batches of the step, sum the counts over all ranks, forward and backward
each micro-batch divided by those counts, sum the metrics over all ranks, update. Validation and saving come between.
"""

import copy
import gc
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minivlm.data.batches import read_step
from minivlm.data.collate import collate
from minivlm.data.features import FeatureCache
from minivlm.data.tokens import TokenTable
from minivlm.model.checkpoint import MANIFEST, CheckpointError, begin, commit, newest_complete, prune
from minivlm.model.export import save_export
from minivlm.model.vlm import MiniVLM
from minivlm.train.engine import Engine, Forward, StepReport
from minivlm.train.initial import exported_model, initial_model, prepare_model
from minivlm.train.job import StageJob, plan_validation
from minivlm.train.losses import MPOWeights, RewardShift
from minivlm.train.metrics import METRICS_FILE, MetricsWriter
from minivlm.train.optimizer import OptimizerSettings
from minivlm.train.reload import check_export
from minivlm.train.samples import Sampler
from minivlm.train.stages import (
    STAGES,
    Batch,
    LossSettings,
    StageLoss,
    StepTotals,
    TrainingError,
    check_first_step,
    count_totals,
)

Rows = Iterator[dict[str, Any]]
Report = Callable[[dict[str, Any], Path | None], None]
"""Called on all ranks with the metrics of a validation or a save, and the folder of the committed checkpoint if any."""


def train_loop(job: StageJob, rows: Rows, device: torch.device, report: Report) -> dict[str, str]:
    """Run (or continue) one stage on this rank of the initialised torch.distributed group.

    Args:
        rows: this rank's micro-batches of the steps that are left, in order.

    Returns:
        {} when all steps are done, {"error": message} where every rank found that training cannot go on: that is no
        failure of a worker, and starting it again would not help.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    torch.set_num_threads(job.config.train.threads_per_worker)
    try:
        StageWorker(job, device, report).run(rows)
    except (TrainingError, CheckpointError) as error:
        return {"error": str(error)}
    finally:
        gc.unfreeze()
    return {}


class StageWorker:
    """One rank of one stage."""

    def __init__(self, job: StageJob, device: torch.device, report: Report) -> None:
        train, settings = job.config.train, job.settings
        self.job, self.stage = job, STAGES[job.stage]
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device, self._report_to = device, report
        model = initial_model(job)
        self.export_model = copy.deepcopy(model) if self.rank == 0 else None
        prepare_model(model, job, device)
        self.engine = Engine(
            model,
            zero_stage=train.zero_stage,
            precision=train.precision,
            optimizer=OptimizerSettings(**{one.name: getattr(settings, one.name) for one in fields(OptimizerSettings)}),
            offload=train.offload,
            total_steps=job.total_steps,
            device=self.device,
            num_lanes=train.parallel_micro_batches,
            is_compiled=train.compile,
        )
        self.shift = RewardShift()
        mpo = train.mpo
        weights = MPOWeights(mpo.dpo_weight, mpo.bco_weight, mpo.sft_weight)
        self.loss_settings = LossSettings(mpo.beta, weights, mpo.sft_token_mean, settings.label_smoothing)
        self.first_step = self._resume()
        self.writer: MetricsWriter | None = None
        self.sampler: Sampler | None = None
        if self.rank == 0:
            self.writer = MetricsWriter(job.run_dir / METRICS_FILE, after_step=self.first_step)
            if train.sample_every_steps:
                self.sampler = Sampler(job, device, after_step=self.first_step)

    def run(self, rows: Rows) -> None:
        """Every step that is left, with validation and checkpoints where they are due."""
        job, every = self.job, self.job.config.train.checkpoint_every_steps
        if self.first_step == job.total_steps:
            return
        for step in range(self.first_step, job.total_steps):
            started = time.perf_counter()
            batches = read_step(rows, step)
            waited = time.perf_counter() - started
            values, num_tokens = self._train_step(step, batches)
            elapsed = time.perf_counter() - started
            if step == self.first_step:
                gc.freeze()  # libraries and what was compiled: to look through these stops all lanes for 0.5 s
            line = {"step": step + 1, **values, "tokens_per_s": num_tokens / elapsed, "data_wait_s": waited}
            is_eval = step + 1 in job.eval_steps
            if is_eval and (val_loss := self._evaluate()) is not None:
                line["val/loss"] = val_loss
            if job.is_sampled(step + 1):
                line |= self._sample(step + 1)
            if self.writer is not None:
                self.writer.write(line)
            if step + 1 == job.total_steps or (step + 1) % every == 0:
                self._report(line, self._save(step + 1, line))
            elif is_eval:
                self._report(line, None)
        for _ in rows:
            raise RuntimeError("the dataset has more rows than the plan: delete the run folder and start again")

    def _train_step(self, step: int, batches: list[Batch]) -> tuple[dict[str, float], int]:
        """Metrics of the step and the tokens that all ranks read, padding not counted."""
        torch.manual_seed((self.job.config.seed * 1_000_003 + step) * self.world_size + self.rank)
        totals, num_tokens = self._count(batches)
        if totals.tokens == 0:
            raise TrainingError(
                f"Step {step + 1} of {self.job.stage} has no supervised token: its answers are empty. "
                f"Look at data.{self.job.stage} and run: python -m jobs.prepare"
            )
        self.engine.module.train()
        shares = self.engine.accumulate(partial(self._loss, totals), batches)
        values = self._sum({name: torch.stack([share[name] for share in shares]).sum() for name in shares[0]})
        self._check_values(step, values)
        report = self.engine.update(step)
        if not math.isfinite(report.grad_norm):
            raise TrainingError(self._divergence(step, "gradient norm", report.grad_norm))
        if totals.pairs:
            self.shift.update((values["rewards/chosen"] + values["rewards/rejected"]) * totals.pairs, totals.pairs)
        return self._line(values, report), num_tokens

    def _loss(self, totals: StepTotals, forward: Forward, batch: Batch) -> StageLoss:
        """Of one micro-batch."""
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        return self.stage.loss(forward(batch), batch, totals, self.loss_settings, self.shift)

    def _line(self, values: dict[str, float], report: StepReport) -> dict[str, float]:
        named = {f"train/{name}" if name.startswith("loss") else name: value for name, value in values.items()}
        return {**named, "lr": report.learning_rate, "grad_norm": report.grad_norm}

    def _check_values(self, step: int, values: dict[str, float]) -> None:
        if not math.isfinite(values["loss"]):
            raise TrainingError(self._divergence(step, "loss", values["loss"]))
        if step == 0 and self.job.stage == "mpo":
            check_first_step(values, precision=self.job.config.train.precision)

    def _divergence(self, step: int, name: str, value: float) -> str:
        rate, stage = self.job.settings.learning_rate, self.job.stage
        return (
            f"The {name} of {stage} is {value} at step {step + 1}; the last checkpoint before it is kept. "
            f"Lower the learning rate: train.{stage}.learning_rate={rate / 3:.1g}"
        )

    def _count(self, batches: list[Batch]) -> tuple[StepTotals, int]:
        counts = torch.zeros(4, dtype=torch.int64)
        for batch in batches:
            counts[:3] += count_totals(batch)
            counts[3] += int((batch["segment_ids"] != 0).sum())
        counts = counts.to(self.device)
        dist.all_reduce(counts)
        tokens, pairs, chosen_tokens, num_tokens = counts.tolist()
        return StepTotals(tokens, pairs, chosen_tokens), num_tokens

    def _sum(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        names = self.stage.metric_names
        sums = torch.stack([metrics[name].double() for name in names])
        dist.all_reduce(sums)
        return dict(zip(names, sums.tolist(), strict=True))

    @torch.no_grad()
    def _evaluate(self) -> float | None:
        """Loss over the validation rows, as one step; None where there are none. The reward shift stays as it is."""
        job, steps = self.job, plan_validation(self.job)
        if not steps or job.val_table is None:
            return None
        table, features = TokenTable.open(job.val_table), FeatureCache.open(job.features_dir)
        self.engine.module.eval()
        loss, tokens = 0.0, 0
        for step in steps:
            mine = step.micro_batches[self.rank :: self.world_size]
            ids = {"image_token_id": job.image_token_id, "pad_token_id": job.pad_token_id}
            batches = [collate(table, rows, features.get, **ids) for rows in mine]
            totals, _ = self._count(batches)
            shares = [self._loss(totals, self.engine.forward, batch).metrics["loss"] for batch in batches]
            total = torch.stack(shares).sum().double()
            dist.all_reduce(total)
            loss, tokens = loss + float(total) * totals.tokens, tokens + totals.tokens
        return loss / tokens

    def _sample(self, step: int) -> dict[str, float]:
        """What the weights after `step` steps answer, on rank 0 alone (elsewhere {}): figures for the curve."""
        current = self._gather(step)
        return {} if self.sampler is None or current is None else self.sampler.write(step, current)

    def _resume(self) -> int:
        found = [newest_complete(self.job.run_dir)] if self.rank == 0 else [None]
        dist.broadcast_object_list(found, src=0)
        if found[0] is None:
            return 0
        manifest = json.loads((found[0] / MANIFEST).read_text())
        try:
            self.shift.load_state_dict(manifest["client_state"]["reward_shift"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{found[0] / MANIFEST} has no reward shift ({error!r}). Delete {found[0]}"
            ) from error
        self.engine.load(found[0] / "engine", updates=manifest["step"])
        return int(manifest["step"])

    def _save(self, step: int, line: dict[str, float]) -> Path:
        """Commit a checkpoint of all ranks; returns its folder."""
        job, train = self.job, self.job.config.train
        current = self._gather(step)
        folder = [begin(job.run_dir, step)] if self.rank == 0 else [None]
        dist.broadcast_object_list(folder, src=0)
        assert folder[0] is not None
        self.engine.save(folder[0] / "engine")
        dist.barrier()
        if current is not None:
            save_export(
                folder[0] / "export",
                current,
                tower_path=job.tower_path,
                feature_layer=job.config.clip.feature_layer,
                tokenizer_dir=Path(job.tokenizer_path),
            )
        meta: dict[str, Any] = {
            "stage": job.stage,
            "step": step,
            "world_size": self.world_size,
            "zero_stage": train.zero_stage,
            "metrics": line,
            "client_state": {"reward_shift": self.shift.state_dict()},
        }
        if step == job.total_steps:
            meta["reload_difference"] = check_export(job, self.engine, folder[0] / "export", current, self.device)
        final: list[Path | None] = [None]
        if self.rank == 0:
            final = [commit(job.run_dir, step, meta)]
            prune(job.run_dir, train.keep_checkpoints, newest=step)
        dist.broadcast_object_list(final, src=0)
        assert final[0] is not None
        return final[0]

    def _gather(self, step: int) -> MiniVLM | None:
        """The whole current model on rank 0, float32 on the CPU, adapters merged; overwritten by the next call."""
        lora = self.job.settings.lora
        weights = self.engine.gather_state_dict(learning_only=lora is not None)
        self._check_weights(step, weights)
        if self.export_model is None or weights is None:
            return None
        return exported_model(self.export_model, weights, lora)

    def _check_weights(self, step: int, weights: dict[str, Tensor] | None) -> None:
        """No checkpoint of weights that are not finite may replace the last good one."""
        broken = [name for name, values in (weights or {}).items() if not bool(values.isfinite().all())]
        found = [broken[:1]]
        dist.broadcast_object_list(found, src=0)
        if found[0]:
            raise TrainingError(self._divergence(step - 1, f"weight {found[0][0]}", math.nan))

    def _report(self, line: dict[str, float], checkpoint: Path | None) -> None:
        metrics: dict[str, Any] = {"stage": self.job.stage, "total_steps": self.job.total_steps, **line}
        if "val/loss" in line:
            metrics["val_loss"] = line["val/loss"]
        self._report_to(metrics, checkpoint)
