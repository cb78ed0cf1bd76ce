"""The clip job in each worker: DDP, with embeddings gathered over all ranks so that every other pair is a negative."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPModel

from minivlm.model.clip import build_clip, clip_image_processor, clip_loss, save_clip
from minivlm.scoring.retrieval import retrieval_recall
from minivlm.storage import new_directory, write_json
from minivlm.train.clip_batches import Captions, ClipJob, load_pairs
from minivlm.train.metrics import METRICS_FILE, MetricsWriter
from minivlm.train.optimizer import OptimizerSettings, decay_groups, learning_rate_at

MAX_LOGIT_SCALE = math.log(100)
Rows = Iterator[dict[str, Any]]


class Towers(nn.Module):
    """Both halves of a CLIP on one micro-batch, preprocessing's last step included."""

    def __init__(self, clip: CLIPModel, image_size: int) -> None:
        super().__init__()
        self.clip = clip
        processor = clip_image_processor(image_size)
        self.mean, self.std = processor.image_mean, processor.image_std

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """pixels uint8 and input_ids -> image_embeds, text_embeds [B, D], not normalised."""
        pixel_values = normalize_pixels(batch["pixels"], self.mean, self.std)
        image = self.clip.vision_model(pixel_values=pixel_values).pooler_output
        text = self.clip.text_model(input_ids=batch["input_ids"]).pooler_output
        return self.clip.visual_projection(image), self.clip.text_projection(text)


def build_towers(job: ClipJob) -> Towers:
    """Random weights from the settings and the seed."""
    clip = job.clip
    model = build_clip(
        image_size=clip["image_size_px"],
        patch_size=clip["patch_size_px"],
        vision_hidden_size=clip["vision_hidden_size"],
        vision_layers=clip["vision_layers"],
        vision_heads=clip["vision_heads"],
        text_hidden_size=clip["text_hidden_size"],
        text_layers=clip["text_layers"],
        text_heads=clip["text_heads"],
        max_text_tokens=clip["max_text_tokens"],
        projection_dim=clip["projection_dim"],
        vocab_size=job.vocab_size,
        bos_token_id=job.bos_token_id,
        eos_token_id=job.eos_token_id,
        pad_token_id=job.eos_token_id,
        seed=job.seed,
    )
    return Towers(model, clip["image_size_px"])


def gather(local: Tensor) -> Tensor:
    """Rows of all ranks in rank order; gradients flow to the local ones (with their sum over ranks, to all)."""
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.detach().contiguous())
    parts[dist.get_rank()] = local
    return torch.cat(parts)


def global_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Contrastive loss over the pairs of all ranks, scaled so that DDP's *mean* of gradients is its gradient.

    Every rank computes the whole loss. Embeddings get their gradient on one rank only, hence the factor world size;
    the temperature gets it on all, hence its share is divided by that factor again. Equal captions or pictures are no
    negatives of each other.
    """
    world_size = dist.get_world_size()
    scale = logit_scale.detach() + (logit_scale - logit_scale.detach()) / world_size
    captions, pictures = gather(batch["caption_ids"]), gather(batch["pictures"])
    is_duplicate = (captions[:, None] == captions) | (pictures[:, None] == pictures)
    return world_size * clip_loss(gather(image_embeds), gather(text_embeds), scale, is_duplicate)


def train_loop(job: ClipJob, rows: Rows, device: torch.device | None) -> dict[str, str]:
    """Train on this rank; rank 0 commits the folder. Returns {"error": message} if the loss is not finite.

    Args:
        rows: this rank's micro-batches in order, {id, payload}.
        device: None = CPU.
    """
    torch.set_num_threads(job.threads)
    device = device or torch.device("cpu")
    rank = dist.get_rank()
    towers = build_towers(job).to(device)
    ddp = DistributedDataParallel(towers)
    clip = job.clip
    settings = OptimizerSettings(clip["learning_rate"], clip["weight_decay"], 0.98, clip["warmup_fraction"])
    groups = decay_groups(towers.parameters(), settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.beta2), fused=True)
    writer = MetricsWriter(job.work / METRICS_FILE, after_step=0) if rank == 0 else None
    started = time.perf_counter()
    for step, row in enumerate(rows):
        if row["id"] != step * job.world_size + rank:
            raise RuntimeError(f"step {step} was due on rank {rank}, the dataset gave micro-batch {row['id']}")
        batch = {name: tensor.to(device) for name, tensor in load(row["payload"]).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=job.precision == "bfloat16"):
            image_embeds, text_embeds = ddp(batch)
        loss = global_loss(image_embeds, text_embeds, towers.clip.logit_scale, batch)
        value = float(loss.detach()) / job.world_size
        if not math.isfinite(value):
            return {"error": f"The loss of clip is {value} at step {step + 1}. Type clip.learning_rate=3e-4"}
        loss.backward()
        nn.utils.clip_grad_norm_(towers.parameters(), settings.clip_norm)
        rate = learning_rate_at(step, job.total_steps, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            towers.clip.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        if writer is not None:
            speed = (step + 1) * job.global_batch_size / (time.perf_counter() - started)
            writer.write({"step": step + 1, "train/loss": value, "lr": rate, "samples_per_s": speed})
    if rank == 0:
        _commit(job, towers, device, time.perf_counter() - started)
    dist.barrier()
    return {}


def _commit(job: ClipJob, towers: Towers, device: torch.device, seconds: float) -> None:
    towers.eval()
    first_test = job.num_train + job.num_val
    result = {
        "steps": job.total_steps,
        "global_batch_size": job.global_batch_size,
        "train_s": round(seconds, 1),
        "samples_per_s": round(job.total_steps * job.global_batch_size / seconds, 1),
        "val": _retrieval(job, towers, device, job.num_train, job.num_val),
        "test": _retrieval(job, towers, device, first_test, job.num_test),
    }
    with new_directory(job.target) as folder:
        save_clip(towers.clip, folder)
        write_json(folder / "result.json", result)


@torch.no_grad()
def _retrieval(job: ClipJob, towers: Towers, device: torch.device, first: int, count: int) -> dict[str, float | int]:
    """recall@k of held-out pictures for their captions, and of captions for their pictures (`caption/recall@k`)."""
    if not count:
        return {"num_pairs": 0, "recall@1": 0.0, "recall@5": 0.0}
    batch = load_pairs(job, Captions.load(job.work), np.arange(first, first + count))
    image, text = towers({name: torch.from_numpy(array).to(device) for name, array in batch.items()})
    figures: dict[str, float | int] = {"num_pairs": count}
    for k in (1, 5):
        figures[f"recall@{k}"] = retrieval_recall(image, text, k)
        figures[f"caption/recall@{k}"] = retrieval_recall(text, image, k)
    return figures


def normalize_pixels(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 pixel_values, as CLIP's image processor ends."""
    shape = (1, 3, 1, 1)
    return (pixels.float() / 255 - torch.tensor(mean, device=pixels.device).view(shape)) / torch.tensor(
        std, device=pixels.device
    ).view(shape)
