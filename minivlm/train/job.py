"""What one stage is going to do: everything that driver, dataset and workers must agree on, picklable and plain.

Made by `minivlm.train.launch` in the driver, read by `minivlm.train.loop` in the workers. Holds no weights.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minivlm.config import Config, ConfigError, StageName
from minivlm.config.train import StageConfig
from minivlm.data.encoder import Encoding
from minivlm.data.plan import PlannedStep, plan_epoch
from minivlm.data.tokens import TokenTable

WHITENING_TOKENS = 20_000
"""Picture features that a new projector is fitted to."""

NUM_SAMPLED = 8
"""Questions that are answered every `train.sample_every_steps` steps."""


@dataclass(frozen=True)
class StageJob:
    """One stage of one configuration, with all its inputs resolved to absolute paths."""

    config: Config
    stage: StageName
    run_dir: Path
    train_table: Path
    val_table: Path | None
    """None where the stage has no validation rows."""

    sample_table: Path | None
    """Rows whose questions are answered while training: validation rows of the stage, for mpo those of sft."""

    features_dir: Path
    encoding: Encoding | None
    """data.features=stream: how pictures that training shows and the cache lacks are encoded on the way. Else None."""

    num_features: int
    """Picture features, before the projector."""

    vision_size: int
    """Width of the picture features."""

    tokenizer_path: str
    tower_path: str
    image_token_id: int
    pad_token_id: int
    vocab_size: int
    initial_export: Path | None
    """Export of the previous stage; None for the first."""

    total_steps: int

    @property
    def settings(self) -> StageConfig:
        """`train.<stage>`."""
        settings: StageConfig = getattr(self.config.train, self.stage)
        return settings

    @property
    def eval_steps(self) -> set[int]:
        """Numbers of finished steps after which the validation loss is computed; the last is the end."""
        return evenly_spaced(self.total_steps, self.settings.num_evals)

    @property
    def keeps_copies_on_host(self) -> bool:
        """Whether a whole copy of the model beside the trained one stays on the CPU: where parameters do."""
        return self.config.train.offload == "optimizer_and_parameters"

    def is_sampled(self, step: int) -> bool:
        """Whether questions are answered after `step` finished steps."""
        every = self.config.train.sample_every_steps
        return bool(every) and (step % every == 0 or step == self.total_steps)


def whitening_pictures(train_table: Path, num_features: int) -> list[str]:
    """The pictures that a new projector is fitted to; their features must be there before training starts."""
    return TokenTable.open(train_table).digests[: max(1, WHITENING_TOKENS // num_features)]


def sampled_entries(table: TokenTable) -> list[int]:
    """The rows whose questions are answered while training: always the same, evenly spaced."""
    count = min(NUM_SAMPLED, len(table))
    return [index * len(table) // count for index in range(count)]


def sampled_pictures(config: Config, stage: StageName, sample_table: Path | None) -> set[str]:
    """Pictures that sample generations show; none where `train.sample_every_steps` is 0.

    Raises:
        ConfigError: there are no validation rows to ask about.
    """
    every = config.train.sample_every_steps
    if not every:
        return set()
    table = TokenTable.open(sample_table) if sample_table is not None else None
    if not table:
        raise ConfigError(
            f"train.sample_every_steps={every} answers questions of validation rows, and "
            f"data.{'sft' if stage == 'mpo' else stage} has none: type train.sample_every_steps=0 for this stage"
        )
    return {digest for entry in sampled_entries(table) for digest in table[entry].image_sha256}


def planned_pictures(job: StageJob) -> set[str]:
    """Pictures that the stage's training steps show."""
    table = TokenTable.open(job.train_table)
    entries = [entry for step in plan_training(job) for rows in step.micro_batches for row in rows for entry in row]
    digests = table.digests
    return {digests[row] for row in set(table.pictures_of(entries).tolist())}


def evenly_spaced(total: int, count: int) -> set[int]:
    """`count` (at most `total`) evenly spaced numbers in 1..total, `total` among them."""
    return {round(total * (i + 1) / min(count, total)) for i in range(min(count, total))}


def count_steps(num_units: int, settings: StageConfig) -> int:
    """Optimizer steps of a stage; the last of an epoch may be smaller."""
    steps = settings.epochs * -(-num_units // settings.global_batch_size)
    return min(steps, settings.max_steps) if settings.max_steps else steps


def plan_training(job: StageJob, *, first_step: int = 0) -> list[PlannedStep]:
    """All steps of the stage from `first_step` on, over its epochs: the same in every process."""
    lengths, group_size = _lengths(job.train_table)
    per_epoch = -(-(len(lengths) // group_size) // job.settings.global_batch_size)
    steps: list[PlannedStep] = []
    for epoch in range(first_step // per_epoch, -(-job.total_steps // per_epoch)):
        planned = _plan(job, lengths, group_size, epoch)
        steps += planned[max(0, first_step - epoch * per_epoch) : job.total_steps - epoch * per_epoch]
    return steps


def plan_validation(job: StageJob) -> list[PlannedStep]:
    """The validation rows, once, in a fixed order."""
    if job.val_table is None:
        return []
    lengths, group_size = _lengths(job.val_table)
    return _plan(job, lengths, group_size, epoch=0)


def _lengths(table_dir: Path) -> tuple[np.ndarray, int]:
    table = TokenTable.open(table_dir)
    return table.lengths, table.group_size


def _plan(job: StageJob, lengths: np.ndarray, group_size: int, epoch: int) -> list[PlannedStep]:
    train = job.config.train
    return plan_epoch(
        lengths,
        group_size=group_size,
        seed=job.config.seed,
        epoch=epoch,
        global_batch_size=job.settings.global_batch_size,
        world_size=train.num_workers * train.parallel_micro_batches,
        micro_batch_tokens=train.micro_batch_tokens,
        pack_length=train.pack_length_tokens,
    )
