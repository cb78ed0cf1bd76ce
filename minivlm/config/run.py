"""Settings of what surrounds training: evaluation, search, tracking, serving, the cluster."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from minivlm.config.base import Frozen
from minivlm.config.benchmarks import BenchmarkConfig
from minivlm.config.model import ProjectorKind

Variant = Literal["shuffled", "no_image", "jpeg", "blur", "rotate", "occlude", "direct", "cot", "few_shot"]


class EvaluationConfig(Frozen):
    """Held-out questions, answered greedily."""

    max_new_tokens: PositiveInt = 96
    """Longest answer, in tokens; one that reaches it is counted as cut."""

    batch_size: PositiveInt = 256
    """Answers decoded together by one actor. One batch is what a killed evaluation loses at most per actor."""

    num_actors: PositiveInt = 1
    """Generation actors, for evaluation and for preference sampling."""

    cpus_per_actor: NonNegativeFloat = 1.0
    gpus_per_actor: NonNegativeFloat = 0.0
    threads_per_actor: PositiveInt = 2
    """torch threads of one generation or encoder actor."""

    max_questions_per_task: PositiveInt | None = None
    """Ask a seeded choice of so many; default: all."""

    variants: tuple[Variant, ...] = ("shuffled",)
    """Further ways in which each question is asked, beside the plain one; each costs as much time as that one.

    shuffled: with the pictures of another question of the task. no_image: without its pictures and their placeholders.
    jpeg (quality 10), blur (2 % of the shorter side), rotate (15 degrees), occlude (a grey square of 35 % of the
    shorter side): with its pictures made worse. direct: a request for a chain of thought is replaced by one for a short
    answer. cot: the reverse, in the question's language. few_shot: behind `num_shots` examples. Questions to which a
    variant does not apply are left out of it and counted with the reason."""

    num_shots: PositiveInt = 2
    """Examples of the variant few_shot: training rows of the question's task and language with their pictures, another
    choice for each question, the same every time. All must fit the context length of the model."""

    exports: dict[str, Path] = Field(default_factory=dict)
    """Further models that answer the same questions, beside the finished stages: name -> folder of an export. Their
    vision tower must be the one of this configuration."""

    baseline: str | None = None
    """Name of the stage or export with which all others are compared, question by question. Default: sft where it is
    among them, else the first."""

    report_samples_per_task: PositiveInt = 12
    """Questions per task shown in the report with their picture."""

    heat_maps: NonNegativeInt = 4
    """Questions for which the report shows where each checkpoint looked, computed when it is evaluated; 0 = none."""

    benchmarks: tuple[BenchmarkConfig, ...] = ()
    """Public benchmarks, asked beside the test split as tasks of their own."""

    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Largest share of a benchmark's rows that may be set aside; above it nothing is asked. Of training rows:
    data.max_bad_fraction."""


class TuneConfig(Frozen):
    """Search over projector kind and learning rate with ASHA."""

    stage: Literal["pretrain", "sft"] = "pretrain"
    num_trials: PositiveInt = 4
    max_concurrent_trials: PositiveInt = 2
    """Each is one process with `train.cpus_per_worker` CPUs and, with `train.use_gpu`, one GPU."""

    projectors: tuple[ProjectorKind, ...] = ("linear", "mlp2x_gelu")
    """Grid; crossed with the learning rates drawn."""

    min_learning_rate: PositiveFloat = 3e-4
    max_learning_rate: PositiveFloat = 3e-3
    """Log-uniform bounds."""

    max_steps: PositiveInt = 60
    """Optimizer steps of a trial."""

    num_reports: PositiveInt = 3
    """Validation reports per trial; ASHA may stop it at each."""


class TrackingConfig(Frozen):
    """MLflow."""

    uri: str | None = None
    """Tracking server. Default: SQLite under storage_path."""

    experiment: str = "minivlm"
    model_name: str = "minivlm"
    """Registered model; `@champion` serves, `@challenger` waits, `@previous` rolls back."""


class ServeConfig(Frozen):
    """The HTTP endpoint."""

    host: str = "127.0.0.1"
    """Anything but loopback needs an API key in $MINIVLM_API_KEY."""

    port: int = Field(8000, ge=1, le=65535)
    num_replicas: PositiveInt = 1
    cpus_per_replica: NonNegativeFloat = 0.5
    gpus_per_replica: NonNegativeFloat = 0.0
    threads_per_replica: PositiveInt = 2
    """torch threads of one replica."""

    max_new_tokens: PositiveInt = 128
    """Answer length when the request names none, in tokens."""

    max_ongoing_requests: PositiveInt = 8
    max_queued_requests: PositiveInt = 32
    """More waiting requests are answered 429."""

    request_timeout_s: PositiveFloat = 60.0


class ClusterConfig(Frozen):
    """The Ray cluster."""

    address: str | None = None
    """`auto` or host:port of a running cluster. Default: the one a Ray job runs in, else a local one is started."""

    num_cpus: PositiveFloat | None = None
    """Logical CPUs of a local cluster. Default: the machine's."""

    object_store_bytes: PositiveInt = 512 * 1024 * 1024
    """Shared memory of a local cluster."""

    dashboard_port: int = Field(8265, ge=1, le=65535)
