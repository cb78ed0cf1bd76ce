"""Train the vision tower from scratch: a CLIP on the pretrain captions, by Ray Train. Called by `python -m jobs.clip`.

Ray Data tasks decode and preprocess every picture once, to uint8, with the very processor that is saved beside the
weights; training then streams micro-batches from that file. The folder appears complete or not at all.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray.data
from ray.train import FailureConfig, RunConfig, TrainingFailedError

from minivlm import layout
from minivlm.config import Config, ConfigError
from minivlm.data.captions import caption_of, captioned
from minivlm.data.images import ImageLimits, read_image
from minivlm.data.pipeline import prepare_samples, prepare_tokenizer
from minivlm.data.samples import load_samples
from minivlm.data.settings import image_limits
from minivlm.data.stream import from_tables
from minivlm.log import get_logger
from minivlm.model.clip import clip_image_processor
from minivlm.model.tokenizer import END_OF_TEXT, TURN_START, encode_text, load_tokenizer, token_id
from minivlm.schema import Sample
from minivlm.train.clip_batches import Captions, ClipJob, pixels_file
from minivlm.train.environment import worker_environment
from minivlm.train.feed import clip_dataset, clip_worker
from minivlm.train.launch import RESULT_FILE, check_resources, torch_trainer
from minivlm.train.metrics import METRICS_FILE, ProgressFollower
from minivlm.train.stages import TrainingError

PICTURES_PER_BLOCK = 256
RETRIEVAL_SCENES = 256
"""Held-out scenes with distinct captions among which retrieval is measured."""

log = get_logger(__name__)


def train_clip(config: Config) -> Path:
    """Train the CLIP of these settings, once; returns its folder (stock CLIPModel, image processor, result.json).

    English captions are used, or all where a source has none in English. result.json has recall@1 and recall@5 on the
    val and test splits, picture to caption and back.

    Raises:
        TrainingError: too few captions for the workers, workers that died, or a loss that is not finite.
        ConfigError: a placement that this cluster can never schedule.
    """
    target = layout.clip_dir(config)
    if (target / RESULT_FILE).exists():
        log.debug("clip is finished, nothing to do: %s", target)
        return target
    check_resources(config)
    work = target.with_name(f".{target.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        job = _prepare(config, target, work)
        _fit(config, job)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result = json.loads((target / RESULT_FILE).read_text())
    test = result["test"]
    log.info("clip: test recall@1 %.3f, @5 %.3f among %d", test["recall@1"], test["recall@5"], test["num_pairs"])
    return target


def _prepare(config: Config, target: Path, work: Path) -> ClipJob:
    samples_dir = prepare_samples(config)
    tokenizer = load_tokenizer(prepare_tokenizer(config))
    train = captioned(load_samples(samples_dir, stage="pretrain", split="train"))
    val, test = (
        _distinct(captioned(load_samples(samples_dir, stage="pretrain", split=split))) for split in ("val", "test")
    )
    workers = config.train.num_workers
    if len(train) < workers:
        raise TrainingError(
            f"{len(train)} captioned pictures cannot train a CLIP on {workers} workers. Add rows to data.pretrain, "
            "or type clip.path=openai/clip-vit-base-patch32"
        )
    chosen = train + val + test
    pictures = {sample.image_sha256[0]: sample.images[0] for sample in chosen}
    _write_pixels(config, list(pictures.values()), work)
    place = {digest: row for row, digest in enumerate(pictures)}
    end = token_id(tokenizer, END_OF_TEXT)
    longest = config.clip.max_text_tokens - 1
    ids = [[*encode_text(tokenizer, caption_of(sample))[:longest], end] for sample in chosen]
    captions = Captions.build(ids, [place[sample.image_sha256[0]] for sample in chosen], pad_token_id=end)
    captions.save(work)
    batch = min(config.clip.global_batch_size, len(train)) // workers * workers
    if not batch:
        raise ConfigError(
            f"clip.global_batch_size={config.clip.global_batch_size} with {len(train)} captions leaves nothing for "
            f"{workers} workers: type clip.global_batch_size={workers} or more, or train.num_workers=1"
        )
    return ClipJob(
        clip=config.clip.model_dump(),
        seed=config.seed,
        work=work,
        target=target,
        num_pictures=len(pictures),
        num_train=len(train),
        num_val=len(val),
        num_test=len(test),
        global_batch_size=batch,
        total_steps=config.clip.epochs * (len(train) // batch),
        world_size=workers,
        threads=config.train.threads_per_worker,
        use_gpu=config.train.use_gpu,
        precision=config.train.precision,
        vocab_size=len(tokenizer),
        bos_token_id=token_id(tokenizer, TURN_START),
        eos_token_id=end,
    )


def _distinct(samples: list[Sample]) -> list[Sample]:
    """The first samples with distinct pictures and captions, at most RETRIEVAL_SCENES."""
    chosen: list[Sample] = []
    seen: set[str] = set()
    for sample in samples:
        keys = {caption_of(sample), sample.image_sha256[0]}
        if seen.isdisjoint(keys) and len(chosen) < RETRIEVAL_SCENES:
            chosen.append(sample)
            seen |= keys
    return chosen


def preprocess_uint8(block: pa.Table, *, image_size: int, limits: ImageLimits) -> pa.Table:
    """Column path -> column pixels: bytes of uint8 [3, H, W], resized and cropped but not yet normalised."""
    processor = clip_image_processor(image_size)
    images = [read_image(Path(path), limits)[0] for path in block["path"].to_pylist()]
    pixels = processor(images=images, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    rounded = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return pa.table({"pixels": pa.array([picture.tobytes() for picture in rounded], pa.binary())})


def _write_pixels(config: Config, paths: list[str], work: Path) -> None:
    starts = range(0, len(paths), PICTURES_PER_BLOCK)
    blocks = [pa.table({"path": paths[start : start + PICTURES_PER_BLOCK]}) for start in starts]
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    with ray.data.DataContext.current(context):
        dataset = from_tables(blocks).map_batches(
            partial(preprocess_uint8, image_size=config.clip.image_size_px, limits=image_limits(config)),
            batch_size=None,
            batch_format="pyarrow",
        )
        with pixels_file(work).open("wb") as file:
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                for pixels in table["pixels"]:
                    file.write(pixels.as_buffer())


def _fit(config: Config, job: ClipJob) -> None:
    run_config = RunConfig(
        name="ray",
        storage_path=str(job.work),
        failure_config=FailureConfig(max_failures=config.train.max_failures),
        worker_runtime_env={"env_vars": worker_environment(config)},
    )
    trainer = torch_trainer(config, clip_worker, job, partial(clip_dataset, job), run_config)
    with ProgressFollower(job.work / METRICS_FILE, first_step=0, total_steps=job.total_steps, label="clip"):
        try:
            outcome = trainer.fit().return_value or {}
        except TrainingFailedError as error:
            reason = str(error).strip().splitlines()[-1]
            raise TrainingError(f"clip stopped: {reason}. Type the same command again") from error
    if "error" in outcome:
        raise TrainingError(outcome["error"])
