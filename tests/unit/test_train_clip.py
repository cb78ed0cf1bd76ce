"""The clip job's batches: the same preprocessing as serving, every pair once an epoch, gradients of the whole batch."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from minivlm.data.images import ImageLimits
from minivlm.model.clip import clip_image_processor, clip_loss
from minivlm.train.clip_batches import Captions, ClipJob, pairs_of
from minivlm.train.clip_loop import global_loss, normalize_pixels
from minivlm.train.contrastive import preprocess_uint8
from tests.forks import Forked, join

LIMITS = ImageLimits(10**7, 10**7, 10**4, 20.0)


def make_job(folder: Path, **changes: int) -> ClipJob:
    sizes = {"num_train": 26, "global_batch_size": 8, "total_steps": 6, "world_size": 2} | changes
    return ClipJob(
        clip={}, seed=3, work=folder, target=folder, num_pictures=1, num_val=0, num_test=0, threads=1, use_gpu=False,
        precision="float32", vocab_size=9, bos_token_id=1, eos_token_id=0, **sizes,
    )  # fmt: skip


@pytest.mark.parametrize("size", [(16, 16), (40, 23)])
def test_training_preprocesses_as_the_saved_processor(size: tuple[int, int], tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    picture = Image.fromarray(noise)
    picture.save(tmp_path / "picture.png")
    table = preprocess_uint8(pa.table({"path": [str(tmp_path / "picture.png")]}), image_size=16, limits=LIMITS)
    pixels = torch.frombuffer(bytearray(table["pixels"][0].as_py()), dtype=torch.uint8).view(1, 3, 16, 16)
    processor = clip_image_processor(16)
    served = processor(images=[picture], return_tensors="pt")["pixel_values"]
    assert_close(normalize_pixels(pixels, processor.image_mean, processor.image_std), served, atol=1e-5, rtol=0)


def test_an_epoch_has_every_pair_at_most_once_and_no_rank_repeats_another(tmp_path: Path):
    job = make_job(tmp_path)
    epoch = [tuple(pairs_of(job, step, rank)) for step in range(3) for rank in range(2)]
    seen = [pair for pairs in epoch for pair in pairs]
    assert len(seen) == len(set(seen)) == 24
    assert tuple(pairs_of(job, 3, 0)) != epoch[0]


def test_equal_captions_get_one_number():
    captions = Captions.build([[5, 0], [6, 7, 0], [5, 0]], [0, 1, 2], pad_token_id=0)
    assert captions.caption_ids.tolist() == [0, 1, 0]
    assert captions.input_ids.tolist() == [[5, 0, 0], [6, 7, 0], [5, 0, 0]]


class Pair(nn.Module):
    """Two linear towers and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(4, 3), nn.Linear(5, 3)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.image(batch["image"]), self.text(batch["text"])


def whole_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    batch = {"image": torch.randn(6, 4, generator=generator), "text": torch.randn(6, 5, generator=generator)}
    return batch | {"caption_ids": torch.tensor([0, 1, 2, 1, 3, 4]), "pictures": torch.arange(6)}


def two_rank_gradients(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = Pair()
    ddp = DistributedDataParallel(model)
    mine = {name: tensor[rank * 3 : rank * 3 + 3] for name, tensor in whole_batch().items()}
    image_embeds, text_embeds = ddp(mine)
    global_loss(image_embeds, text_embeds, model.logit_scale, mine).backward()
    if rank == 0:
        torch.save({name: parameter.grad for name, parameter in model.named_parameters()}, f"{folder}/gradients.pt")
    dist.barrier()  # neither leaves while the other still needs it
    dist.destroy_process_group()


def test_two_ranks_have_the_gradient_of_the_whole_batch(tmp_path: Path):
    assert join([Forked(two_rank_gradients, rank, str(tmp_path)) for rank in range(2)], timeout_s=300) == [0, 0]
    model, batch = Pair(), whole_batch()
    duplicate = batch["caption_ids"][:, None] == batch["caption_ids"]
    clip_loss(*model(batch), model.logit_scale, duplicate).backward()
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert_close(gradients, {name: parameter.grad for name, parameter in model.named_parameters()})
