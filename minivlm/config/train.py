"""Settings of the three training stages and of the preference pairs between them."""

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from minivlm.config.base import Frozen, cpu_has_bfloat16


class StageConfig(Frozen):
    """What every training stage has."""

    trainable: tuple[Literal["projector", "language_model"], ...] = ("projector", "language_model")
    """Parts that learn. With a pretrained language model, the pretrain stage should list `projector` only."""

    learning_rate: PositiveFloat = 1e-3
    """Peak AdamW rate, reached after warm-up. Per optimizer step."""

    muon_learning_rate: NonNegativeFloat = 0.0
    """Peak rate of Muon for the matrices of the language model's layers (usual: 0.02); 0 = AdamW for them too."""

    weight_decay: NonNegativeFloat = 0.05
    """Decoupled decay of matrices; norms and biases are spared."""

    beta2: float = Field(0.99, gt=0, lt=1)
    """Second AdamW momentum; the first is 0.9."""

    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the steps spent warming up linearly; a cosine to 0 follows."""

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
    """Third training stage: learn from chosen/rejected answer pairs (arXiv:2411.10442)."""

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
    """Ray Train workers (data-parallel ranks)."""

    use_gpu: bool = False
    """One GPU per worker and nccl, instead of CPU and gloo."""

    cpus_per_worker: PositiveFloat = 0.5
    """Logical CPUs that a worker reserves. Leave some to Ray Data, or nothing is ever scheduled."""

    threads_per_worker: PositiveInt = 1
    """torch threads of one worker."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 0 none, 1 optimizer, 2 + gradients, 3 + parameters sharded."""

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


class PreferencesConfig(Frozen):
    """How the cluster builds chosen/rejected pairs from the SFT model's answers."""

    num_samples: PositiveInt = 8
    """Answers sampled per question."""

    temperature: PositiveFloat = 1.0
    top_k: PositiveInt = 50
    max_new_tokens: PositiveInt = 96
    max_pairs_per_question: PositiveInt = 2
    """MMPR's own cap is 15."""

    max_questions: PositiveInt | None = None
    """Use only so many prompts."""

    min_pairs: PositiveInt = 8
    """Fewer pairs than this fail the job: MPO would learn nothing."""

    batch_size: PositiveInt = 256
    """Sequences decoded together by one actor."""
