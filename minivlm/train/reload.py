"""The check after a stage's last save: its export is read again and must be the model that was trained.

Every weight must be the bits that were written, and the logits of a row of the stage's last step those of the live
model. Called by `minivlm.train.loop` before the checkpoint is committed, so a stage that fails it has no result.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minivlm.data.collate import Batch, collate
from minivlm.data.features import FeatureCache
from minivlm.data.tokens import IGNORE, TokenTable
from minivlm.model.checkpoint import CheckpointError
from minivlm.model.export import load_export
from minivlm.model.fast_layers import compile_model, use_segment_attention
from minivlm.model.vlm import MiniVLM, cast_weights
from minivlm.train.engine import Engine
from minivlm.train.job import StageJob, plan_training
from minivlm.train.stages import TrainingError

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}
"""Largest difference of a logit, as a share of the largest logit. In float32 the products are the same and so, where
libraries choose the same kernel for differently aligned memory, are the bits; merged adapters and bfloat16 round."""

ROUNDED_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""As above, where the live model has other products: merged adapters, or a device that holds no second model."""


def check_export(
    job: StageJob, engine: Engine, directory: Path, written: MiniVLM | None, device: torch.device
) -> float | None:
    """`check_reload` of the export of the last step; every rank calls it, and all fail together.

    Args:
        written: on rank 0 what the export was made of; None elsewhere.

    Returns:
        On rank 0 the largest difference of a logit. None elsewhere, and with adapters on 4-bit weights: these are
        merged into other weights than they were trained with (docs/training.md), so there is nothing to compare with.

    Raises:
        TrainingError: it is not the model that was trained.
    """
    lora, train = job.settings.lora, job.config.train
    if lora is not None and lora.quantization != "none":
        return None
    batch = {name: tensor.to(device) for name, tensor in probe_batch(job).items()}
    live = engine.module
    assert isinstance(live, MiniVLM)
    live.eval()
    logits = probe_logits(live, engine.forward, batch)  # on every rank: ZeRO-3 gathers
    difference: float | None = None
    found: list[str | None] = [None]
    if written is not None:
        try:
            logits = logits.cpu() if job.keeps_copies_on_host else logits
            difference = check_reload(
                directory,
                written,
                logits,
                batch,
                precision=train.precision,
                is_rounded=lora is not None or job.keeps_copies_on_host,
                is_compiled=train.compile,
            )
        except CheckpointError as error:
            found = [str(error)]
    dist.broadcast_object_list(found, src=0)
    if found[0] is not None:
        raise TrainingError(
            f"The export of {job.stage} is not the model that was trained: {found[0]}. It was not committed. "
            "Look at the disk; then type the same command: training goes on from the checkpoint before"
        )
    return difference


def probe_batch(job: StageJob) -> Batch:
    """One row that the stage's last step showed, with every token supervised: logits of all places are compared."""
    (planned,) = plan_training(job, first_step=job.total_steps - 1)
    table, features = TokenTable.open(job.train_table), FeatureCache.open(job.features_dir)
    batch = collate(
        table,
        planned.micro_batches[0][:1],
        features.get,
        image_token_id=job.image_token_id,
        pad_token_id=job.pad_token_id,
    )
    batch["labels"] = batch["input_ids"].masked_fill(batch["segment_ids"] == 0, IGNORE)
    return batch


@torch.no_grad()
def probe_logits(model: MiniVLM, forward: Callable[[Batch], Any], batch: Batch) -> Tensor:
    """[M, V] float32 logits of the supervised places, as the head gives them while `forward` runs `model`."""
    seen: list[Tensor] = []
    head = model.language_model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(output.float()))
    try:
        found = forward(batch)
    finally:
        handle.remove()
    return seen[0][: len(found.logps)]  # the head computes some more


def check_reload(
    directory: Path,
    written: MiniVLM,
    live_logits: Tensor,
    batch: Batch,
    *,
    precision: str,
    is_rounded: bool,
    is_compiled: bool = False,
) -> float:
    """Read an export and compare it with what was written and with the model that was trained.

    Args:
        written: the model that the export was made of, float32 on the CPU.
        live_logits: `probe_logits` of the live model, on the device that the export is to run on.
        batch: what they were computed from, on any device.
        precision: arithmetic of the live model; the export's weights are rounded to it.
        is_rounded: the live model did not compute the same products, see `ROUNDED_TOLERANCE`.
        is_compiled: the live model's layers are compiled; the export's then are too.

    Returns:
        The largest difference of a logit.

    Raises:
        CheckpointError: it cannot be read, a weight has other bits, or logits differ by more than the tolerance.
    """
    vlm = load_export(directory).vlm
    expected = dict(written.named_parameters())
    for name, weights in vlm.named_parameters():
        if name not in expected or not torch.equal(weights, expected[name]):
            raise CheckpointError(f"{directory}: {name} is not read as it was written")
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    vlm = vlm.to(live_logits.device)
    cast_weights(vlm, dtype)
    use_segment_attention(vlm)  # as the live model
    if is_compiled:
        compile_model(vlm, live_logits.device)
    batch = {name: tensor.to(live_logits.device) for name, tensor in batch.items()}
    difference = float((probe_logits(vlm, vlm, batch) - live_logits).abs().max())
    tolerance = (ROUNDED_TOLERANCE if is_rounded else TOLERANCE)[precision] * float(live_logits.abs().max())
    if not difference <= tolerance:  # nor where it is no number
        raise CheckpointError(
            f"{directory}: logits differ by {difference:.2g} from those of the trained model, at most {tolerance:.2g} "
            f"are rounding in {precision}"
        )
    return difference
