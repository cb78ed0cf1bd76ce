"""Settings of the three training stages."""

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from minivlm.config.base import Frozen, cpu_has_bfloat16


class LoraConfig(Frozen):
    """Low-rank adapters (arXiv:2106.09685): W stays, and W + alpha / rank * B A is used; B starts at 0."""

    rank: PositiveInt = 16
    """Rows of A and columns of B."""

    alpha: PositiveInt = 32
    """Scale of the update, divided by the rank. Unitless."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is zeroed in training."""

    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    """Names of the linear layers inside the language model's layers that get an adapter. The experts of a mixture are
    no such layers: list its attention only."""

    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: the adapted matrices are held in 4 bits (QLoRA, arXiv:2305.14314). Needs CUDA and bitsandbytes."""


Part = Literal["projector", "language_model", "language_model.edges"]


class StageConfig(Frozen):
    """What every training stage has."""

    trainable: tuple[Part, ...] = Field(("projector", "language_model"), min_length=1)
    """Parts that learn. With a pretrained language model, the pretrain stage should list `projector` only.
    `language_model` is all of it; `language_model.edges` its first and last layers, while the embedding, the head
    (tied or not) and the last norm stay frozen."""

    edge_layers: PositiveInt = 1
    """Layers at each end that `language_model.edges` trains."""

    lora: LoraConfig | None = None
    """Train adapters instead of the weights of the language model. Exports are merged. Default: the weights."""

    learning_rate: PositiveFloat = 1e-3
    """Peak AdamW rate, reached after warm-up. Per optimizer step."""

    muon_learning_rate: NonNegativeFloat = 0.0
    """Peak rate of Muon for the matrices of the language model's layers (usual: 0.02); 0 = AdamW for them too."""

    weight_decay: NonNegativeFloat = 0.05
    """Decoupled decay of matrices; norms and biases are spared."""

    beta2: float = Field(0.99, gt=0, lt=1)
    """Second AdamW momentum; the first is 0.9."""

    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the steps spent warming up linearly; `schedule` follows."""

    schedule: Literal["cosine", "wsd"] = "cosine"
    """`cosine`: falls from the end of the warm-up on. `wsd`: stays at the peak, then decays at the end
    (warm-up, stable, decay; arXiv:2404.06395)."""

    decay_fraction: float = Field(0.2, gt=0, le=1)
    """wsd only: share of the steps spent decaying, by 1 - sqrt of the progress (arXiv:2405.18392)."""

    min_lr_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the peak rate at which the schedule ends."""

    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of attention weights that is zeroed in training. Not for mpo."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread evenly over the vocabulary; the validation loss is without. Not for mpo."""

    clip_norm: PositiveFloat = 1.0
    """Global gradient norm above which gradients are scaled down. Without effect where muon_learning_rate is set."""

    epochs: PositiveInt = 1
    """Passes over the stage's training rows."""

    max_steps: PositiveInt | None = None
    """Stop (and finish the schedule) after so many optimizer steps."""

    global_batch_size: PositiveInt = 64
    """Samples (MPO: pairs) per optimizer step, summed over workers and accumulation."""

    num_evals: PositiveInt = 1
    """Validation passes, evenly spaced; the last is at the end."""


class MPOConfig(StageConfig):
    """Third training stage: learn from chosen/rejected answer pairs (arXiv:2411.10442).

    The three weights are the paper's. With (1, 0, 0) the same code is DPO, with (0, 1, 0) BCO, with (0, 0, 1)
    supervised training on the chosen answers; a term of weight 0 is still logged, but no part of the loss."""

    beta: PositiveFloat = 0.1
    """Pull towards the reference model. Unitless; larger = stay closer."""

    dpo_weight: NonNegativeFloat = 0.8
    """Weight of the preference term L_p."""

    bco_weight: NonNegativeFloat = 0.2
    """Weight of the quality term L_q."""

    sft_weight: NonNegativeFloat = 1.0
    """Weight of the generation term L_g on chosen answers."""

    sft_token_mean: bool = False
    """L_g: false = mean per sequence, then over pairs (the paper); true = mean over all chosen tokens (TRL)."""


class TrainConfig(Frozen):
    """How the three stages run; each stage's own settings are below."""

    num_workers: PositiveInt = 2
    """Ray Train workers (data-parallel ranks). An interrupted run may go on with another number of them."""

    use_gpu: bool = False
    """One GPU per worker and nccl, instead of CPU and gloo."""

    cpus_per_worker: PositiveFloat = 0.5
    """Logical CPUs that a worker reserves. Leave some to Ray Data, or nothing is ever scheduled."""

    threads_per_worker: PositiveInt = 1
    """torch threads of one worker."""

    parallel_micro_batches: PositiveInt = 1
    """Micro-batches that a worker computes side by side, each with its share of the threads; on CPUs, at zero_stage 0.
    Faster than all threads within each operation, for a copy of the gradients each. Like the number of workers it
    changes the last digits of weights and may change on resume."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 0 none, 1 optimizer, 2 + gradients, 3 + parameters sharded. It too may change on resume."""

    offload: Literal["none", "optimizer", "optimizer_and_parameters"] = "none"
    """What ZeRO holds in host memory instead of the GPU's. `optimizer` needs zero_stage 1 to 3, with parameters 3."""

    gradient_checkpointing: bool = False
    """Compute each layer of the language model again in the backward pass instead of keeping its activations: less
    memory for one more forward, the same gradients."""

    compile: bool = False
    """Compile the language model's layers and the head's loss with torch.compile: faster steps after a minute at the
    start of a stage. It rounds in other places, so last digits of weights differ from those without. Needs g++ on CPUs;
    not with ZeRO-3."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of training. `auto` in a file or override becomes bfloat16 where it is fast: on GPUs, and on CPUs with
    instructions for it (elsewhere a bfloat16 product takes a hundred times as long as a float32 one)."""

    micro_batch_tokens: PositiveInt = 4096
    """Tokens of one forward on one worker, padding included."""

    pack_length_tokens: PositiveInt = 128
    """Longest row that packing makes, in tokens (twice the longest sample where that is more)."""

    checkpoint_every_steps: PositiveInt = 200
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept per run."""

    sample_every_steps: NonNegativeInt = 0
    """Answer eight validation questions greedily every so many optimizer steps and at the end of a stage; the answers
    go to samples.jsonl beside the metrics and to MLflow. It changes no result. 0 = never."""

    max_failures: int = Field(1, ge=0)
    """Worker failures a stage survives by resuming from its newest checkpoint."""

    pretrain: StageConfig = StageConfig()
    sft: StageConfig = StageConfig()
    mpo: MPOConfig = MPOConfig()

    @model_validator(mode="before")
    @classmethod
    def _choose_precision(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("precision") == "auto":
            is_fast = values.get("use_gpu") or cpu_has_bfloat16()
            return {**values, "precision": "bfloat16" if is_fast else "float32"}
        return values

    @model_validator(mode="after")
    def _check_switches(self) -> "TrainConfig":
        if self.offload != "none" and not self.use_gpu:
            raise ValueError(
                f"train.offload={self.offload} moves training state from GPUs to host memory, but train.use_gpu is "
                "false: type train.offload=none, or train.use_gpu=true"
            )
        needed = {"none": 0, "optimizer": 1, "optimizer_and_parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(
                f"train.offload={self.offload} needs what ZeRO-{needed} shards, but train.zero_stage is "
                f"{self.zero_stage}: type train.zero_stage={max(2, needed)}"
            )
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "train.compile=true does not go with ZeRO-3, whose hooks gather each module's weights: type "
                "train.zero_stage=2, or train.compile=false"
            )
        if self.parallel_micro_batches > 1 and (problem := self._parallel_problem()):
            raise ValueError(f"train.parallel_micro_batches={self.parallel_micro_batches}{problem}")
        for name, stage in (("pretrain", self.pretrain), ("sft", self.sft), ("mpo", self.mpo)):
            if problem := _stage_problem(f"train.{name}", stage, self):
                raise ValueError(problem)
        return self

    def _parallel_problem(self) -> str | None:
        """What does not go with several micro-batches at a time, and what to type; None where all does."""
        if self.use_gpu:
            return " is for CPUs, whose cores it keeps busy: type train.parallel_micro_batches=1"
        if self.zero_stage:
            return " needs whole gradients on the worker: type train.zero_stage=0, or train.parallel_micro_batches=1"
        if self.threads_per_worker % self.parallel_micro_batches:
            multiple = -(-self.threads_per_worker // self.parallel_micro_batches) * self.parallel_micro_batches
            return (
                f" has to divide train.threads_per_worker={self.threads_per_worker}: type train.threads_per_worker="
                f"{multiple}, or another number of micro-batches"
            )
        for name, stage in (("pretrain", self.pretrain), ("sft", self.sft)):
            drops = {"attention_dropout": stage.attention_dropout}
            drops |= {"lora.dropout": stage.lora.dropout} if stage.lora else {}
            for key, share in drops.items():
                if share:
                    return (
                        f" would draw what train.{name}.{key}={share:g} drops in another order each time: "
                        f"type train.{name}.{key}=0, or train.parallel_micro_batches=1"
                    )
        return None


def _stage_problem(key: str, stage: StageConfig, train: TrainConfig) -> str | None:
    """What does not go together in one stage, and what to type; None where all does."""
    lora, parts = stage.lora, stage.trainable
    if "language_model" in parts and "language_model.edges" in parts:
        return f"{key}.trainable lists both language_model and language_model.edges: type {key}.trainable=[projector]"
    if stage.schedule == "wsd" and stage.warmup_fraction + stage.decay_fraction > 1:
        return (
            f"{key}.warmup_fraction + {key}.decay_fraction are more than all steps: "
            f"type {key}.decay_fraction={1 - stage.warmup_fraction:g}"
        )
    if stage.muon_learning_rate and train.offload != "none":
        return f"{key}.muon_learning_rate with train.offload was never run: type {key}.muon_learning_rate=0"
    if isinstance(stage, MPOConfig):
        settings = {"attention_dropout": stage.attention_dropout, "label_smoothing": stage.label_smoothing}
        settings |= {"lora.dropout": lora.dropout} if lora else {}
        if wrong := next((name for name, value in settings.items() if value), None):
            return (
                f"{key}.{wrong} would make the policy differ from its reference before anything is learned: "
                f"type {key}.{wrong}=0"
            )
    return _lora_problem(key, stage, lora, train) if lora else None


def _lora_problem(key: str, stage: StageConfig, lora: LoraConfig, train: TrainConfig) -> str | None:
    if "language_model" not in stage.trainable:
        return (
            f"{key}.lora adapts the language model, which {key}.trainable does not list: "
            f"type {key}.trainable=[projector,language_model], or {key}.lora=null"
        )
    if stage.muon_learning_rate:
        return (
            f"{key}.muon_learning_rate orthogonalises the updates of whole matrices, {key}.lora trains factors of "
            f"them: type {key}.muon_learning_rate=0, or {key}.lora=null"
        )
    if lora.quantization == "none":
        return None
    if not train.use_gpu:
        return f"{key}.lora.quantization=nf4 needs CUDA: type {key}.lora.quantization=none, or train.use_gpu=true"
    if train.zero_stage == 3:
        return f"{key}.lora.quantization=nf4: ZeRO-3 cannot shard 4-bit weights: type train.zero_stage=2"
    if isinstance(stage, MPOConfig):
        return (
            f"{key}.lora.quantization=nf4: the reference log-probabilities are those of the unquantised model: "
            f"type {key}.lora.quantization=none"
        )
    return None
