"""Does a training stage fit on so many CPUs and GPUs? Asked before anything starts, and by the dry run. No cluster."""

from minivlm.config import Config, ConfigError

DATA_CPUS = 1.0
"""CPUs that must be left for the tasks that make batches."""


def check_placement(config: Config, *, cpus: float, gpus: float, encoders_beside: bool) -> None:
    """Refuse a placement that would wait for ever: workers take their share first, and batches come from what is left.

    Args:
        cpus, gpus: what the cluster has.
        encoders_beside: encoder actors run at the same time (a stage with data.features=stream).

    Raises:
        ConfigError: the message names the keys and values that fit.
    """
    train, clip = config.train, config.clip
    encoders = clip.num_encoders * clip.cpus_per_encoder if encoders_beside else 0.0
    needed = train.num_workers * train.cpus_per_worker + encoders + DATA_CPUS
    if needed > cpus:
        beside = (
            f", clip.num_encoders={clip.num_encoders} x clip.cpus_per_encoder={clip.cpus_per_encoder:g} beside them"
            if encoders_beside
            else ""
        )
        raise ConfigError(
            f"train.num_workers={train.num_workers} x train.cpus_per_worker={train.cpus_per_worker:g}{beside} and "
            f"{DATA_CPUS:g} CPU for data need {needed:g} CPUs, the cluster has {cpus:g}: nothing would ever start. "
            + _fitting(train.num_workers, cpus - DATA_CPUS - encoders)
            + (", or clip.cpus_per_encoder=0.5, or data.features=cached" if encoders_beside else "")
        )
    if train.use_gpu and train.num_workers > gpus:
        raise ConfigError(
            f"train.num_workers={train.num_workers} with train.use_gpu=true needs as many GPUs, "
            f"the cluster has {gpus:g}. Type "
            + (f"train.num_workers={int(gpus)}" if gpus >= 1 else "train.use_gpu=false")
        )
    if encoders_beside:
        _check_encoder_gpus(config, gpus)


def _fitting(num_workers: int, cpus: float) -> str:
    """What to type where the workers have so many CPUs together; tenths of one are shared out."""
    tenths = int(cpus * 10 + 1e-6)
    if tenths < 1:
        return "Give the cluster more CPUs (cluster.num_cpus, or more nodes)"
    if tenths < num_workers:
        return f"Type train.num_workers={tenths} train.cpus_per_worker=0.1"
    return f"Type train.cpus_per_worker={tenths // num_workers / 10:g}, or fewer train.num_workers"


def _check_encoder_gpus(config: Config, gpus: float) -> None:
    train, clip = config.train, config.clip
    share = clip.gpus_per_encoder
    if not share:
        return
    left = int(gpus) - (train.num_workers if train.use_gpu else 0)
    room = left * int(1 / share) if share <= 1 else int(left / share)  # a share lies on one GPU
    if clip.num_encoders > room:
        taken = f"{train.num_workers} for the trainers, each a whole one" if train.use_gpu else "none for the trainers"
        raise ConfigError(
            f"data.features=stream runs clip.num_encoders={clip.num_encoders} x clip.gpus_per_encoder={share:g} beside "
            f"the trainers, and the cluster's {gpus:g} GPUs ({taken}) have room for {room}: nothing would ever start. "
            "Type data.features=cached, or fewer train.num_workers, or clip.gpus_per_encoder=0 (encode on the CPU)"
        )
