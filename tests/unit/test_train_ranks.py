"""Two ranks under ZeRO-3, of which one may have no picture: nobody hangs, and the weights are those of plain torch."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing import assert_close

from minivlm.train.optimizer import decay_groups, learning_rate_at
from minivlm.train.stages import Batch, StepTotals, count_totals
from tests.forks import Forked, join
from tests.tiny_engine import SETTINGS, STEPS, loss_of, make_engine, micro_batch, padding, tiny_vlm


def ranks_batches(step: int) -> tuple[list[Batch], list[Batch]]:
    """What each of two ranks gets: pictures on one side only, on neither, and a rank that has nothing to do."""
    generator = torch.Generator().manual_seed(step)
    pictures, text = micro_batch(generator, 2, 2), micro_batch(generator, 0, 2, length=24)
    other = micro_batch(generator, 0)
    return [
        ([pictures], [text]),
        ([text, other], [pictures, padding()]),
        ([text], [other]),
        ([pictures], [padding()]),
    ][step]


def train_rank(rank: int, folder: str) -> None:
    """One of the two processes; rank 0 writes the weights."""
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    engine = make_engine(3)
    for step in range(STEPS):
        both = ranks_batches(step)
        totals = StepTotals(sum(int(count_totals(batch)[0]) for batches in both for batch in batches))
        engine.accumulate(loss_of(totals), both[rank])
        engine.update(step)
    weights = engine.gather_state_dict()
    if weights is not None:
        torch.save(weights, f"{folder}/weights.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_a_rank_without_pictures_neither_hangs_nor_changes_the_result(tmp_path: Path):
    assert join([Forked(train_rank, rank, str(tmp_path)) for rank in range(2)], timeout_s=240) == [0, 0]
    model = tiny_vlm()
    optimizer = torch.optim.AdamW(decay_groups(model.parameters(), SETTINGS.weight_decay), lr=1.0, betas=(0.9, 0.99))
    for step in range(STEPS):
        loss = -torch.cat([model(batch).logps for batches in ranks_batches(step) for batch in batches]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, STEPS, SETTINGS)
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert_close(weights, dict(model.named_parameters()), atol=2e-5, rtol=0)
