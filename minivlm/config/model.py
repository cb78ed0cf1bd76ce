"""Settings of the vision tower, the projector and the language model."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from minivlm.config.base import Frozen


class ClipConfig(Frozen):
    """The frozen vision tower (a stock `CLIPModel`), trained here or loaded."""

    path: str | None = None
    """Local folder or hub id of a CLIP or SigLIP, whole or vision half (`openai/clip-vit-large-patch14-336`,
    `google/siglip-base-patch16-224`). Default: a CLIP trained on the pretrain pairs."""

    image_size_px: PositiveInt = 72
    """Side of the tower's input. Of a tower that is loaded, its own settings count; see the dry run."""

    patch_size_px: PositiveInt = 24
    """Side of one patch; (image/patch)^2 features per picture and the class token."""

    vision_hidden_size: PositiveInt = 192
    vision_layers: PositiveInt = 3
    vision_heads: PositiveInt = 3
    text_hidden_size: PositiveInt = 128
    text_layers: PositiveInt = 2
    text_heads: PositiveInt = 2
    max_text_tokens: PositiveInt = 77
    """Longest caption that the text tower reads, in tokens."""

    projection_dim: PositiveInt = 128
    """Width of the shared image-text space."""

    epochs: PositiveInt = 4
    global_batch_size: PositiveInt = 256
    """Pairs per step over all workers; every other pair in it is a negative."""

    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.1
    warmup_fraction: float = Field(0.1, ge=0, lt=1)

    feature_layer: int = Field(-1, lt=0)
    """Layer whose outputs are the features, counted from the last. -1: MiniMind-V; -2: LLaVA's default, and better for
    a tower trained here, whose last layer learns only for the class token."""

    encode_batch_size: PositiveInt = 64
    """Fixed batch shape of the encoder actors; part of the feature fingerprint."""

    encode_precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the encoder actors; features are stored as bfloat16 either way."""

    num_encoders: PositiveInt = 1
    """Encoder actors."""

    cpus_per_encoder: NonNegativeFloat = 1.0
    gpus_per_encoder: NonNegativeFloat = 0.0
    """GPUs (a share is fine) of one encoder actor."""


class LanguageModelConfig(Frozen):
    """Any stock causal language model: from a path or hub id, or random from these sizes."""

    path: str | None = None
    """Local folder or hub id. Default: random weights of the sizes below."""

    architecture: Literal["llama", "qwen2", "qwen3", "qwen3_moe"] = "qwen3"
    """Stock transformers class of a random model."""

    hidden_size: PositiveInt = 192
    num_hidden_layers: PositiveInt = 4
    num_attention_heads: PositiveInt = 3
    num_key_value_heads: PositiveInt = 3
    head_dim: PositiveInt = 64
    intermediate_size: PositiveInt = 512
    tie_word_embeddings: bool = True
    rope_theta: PositiveFloat = 10_000.0
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of random weights. A narrow model learns faster from about 1 / sqrt(hidden_size)."""

    max_position_embeddings: PositiveInt = 2048
    num_experts: PositiveInt = 4
    """qwen3_moe only."""

    num_experts_per_tok: PositiveInt = 2
    """qwen3_moe only."""

    moe_intermediate_size: PositiveInt = 256
    """qwen3_moe only: width of one expert."""

    router_aux_loss_coef: NonNegativeFloat = 0.01
    """qwen3_moe only: weight of the load-balancing loss."""


ProjectorKind = Literal["linear", "mlp2x_gelu", "pixel_shuffle", "resampler"]


class ModelConfig(Frozen):
    """Projector and language model on top of the vision tower."""

    projector: ProjectorKind = "mlp2x_gelu"
    """One token per feature: `linear`, one bias-free layer (LLaVA-1, MiniMind-V); `mlp2x_gelu`, two layers (LLaVA-1.5).
    Fewer tokens: `pixel_shuffle` merges squares of patches, then two layers (InternVL); `resampler`, learned queries
    with cross-attention (Flamingo). Stock transformers loads exports of the first two only."""

    pixel_shuffle_factor: int = Field(2, ge=2)
    """pixel_shuffle only: patches along a side of the square that becomes one token. A grid that the squares do not
    tile is filled by repeating its last row and column."""

    resampler_queries: PositiveInt = 16
    """resampler only: tokens per picture."""

    resampler_layers: PositiveInt = 2
    """resampler only: blocks of cross-attention and feed-forward layer, as wide as the language model."""

    resampler_heads: PositiveInt = 4
    """resampler only: attention heads; they must divide the language model's hidden_size."""

    language_model: LanguageModelConfig = LanguageModelConfig()

    max_length_tokens: PositiveInt = 512
    """Longest sample, image tokens included. Longer ones are quarantined, never cut."""

    @property
    def is_stock_llava(self) -> bool:
        """True where plain transformers can express the model, and so loads its export."""
        return self.projector in ("linear", "mlp2x_gelu")

    @property
    def projector_sizes(self) -> dict[str, int]:
        """The settings that some projector kinds read, by name."""
        return {
            "pixel_shuffle_factor": self.pixel_shuffle_factor,
            "resampler_queries": self.resampler_queries,
            "resampler_layers": self.resampler_layers,
            "resampler_heads": self.resampler_heads,
        }
