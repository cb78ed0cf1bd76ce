"""Language model: any stock causal model of transformers, from weights or random from its sizes.

Called by training before the first stage; later stages read an export instead.
"""

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from minivlm.model.loading import explain_loading

CONFIG_CLASSES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
}
MOE_SIZES = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "router_aux_loss_coef"}
VOCAB_MULTIPLE = 64


def padded_vocab_size(vocab_size: int) -> int:
    """Next multiple of 64: matrix kernels want it. Rows above the tokenizer's size are never a label."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def build_language_model(
    *, path: str | None, architecture: str, sizes: dict[str, Any], vocab_size: int, seed: int
) -> PreTrainedModel:
    """A float32 causal language model with sdpa attention and room for every token.

    Args:
        path: local folder or hub id with safetensors. None: random weights.
        architecture: llama, qwen2, qwen3 or qwen3_moe; unused with a path.
        sizes: fields of the `model.language_model` settings but path and architecture; unused with a path. The
            mixture-of-experts fields matter to qwen3_moe only.
        vocab_size: tokens of the tokenizer. The model gets the next multiple of 64, never less than it had.
        seed: of the random weights, or of the new embedding rows of a loaded model.

    Raises:
        ValueError: unknown architecture or size, sizes that do not fit, or weights that are not all there.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if path is not None:
            return _load(path, padded_vocab_size(vocab_size))
        config = language_config(architecture, sizes, vocab_size)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch.float32
        )
        return model


def language_config(architecture: str, sizes: dict[str, Any], vocab_size: int) -> PreTrainedConfig:
    """The transformers configuration of a random model; see `build_language_model`."""
    if architecture not in CONFIG_CLASSES:
        raise ValueError(
            f"model.language_model.architecture is `{architecture}`: type one of {', '.join(CONFIG_CLASSES)}"
        )
    fields = {key: value for key, value in sizes.items() if architecture == "qwen3_moe" or key not in MOE_SIZES}
    width = fields["num_attention_heads"] * fields["head_dim"]
    if architecture == "qwen2":
        del fields["head_dim"]
        if width != fields["hidden_size"]:
            raise ValueError(
                f"qwen2 has no head width of its own: model.language_model.num_attention_heads x head_dim is {width}, "
                f"but hidden_size is {fields['hidden_size']}; make them equal or choose qwen3"
            )
    if fields["num_attention_heads"] % fields["num_key_value_heads"]:
        raise ValueError(
            "model.language_model.num_attention_heads must be a multiple of num_key_value_heads: "
            f"type model.language_model.num_key_value_heads={fields['num_attention_heads']}"
        )
    rope = {"rope_type": "default", "rope_theta": float(fields.pop("rope_theta"))}
    config = CONFIG_CLASSES[architecture](vocab_size=padded_vocab_size(vocab_size), rope_parameters=rope, **fields)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return config


def _load(path: str, vocab_size: int) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"No language model under `{path}` ({str(error).splitlines()[0]}). Type model.language_model.path=FOLDER "
            "with config.json and safetensors, or leave it out for a random model"
        ) from error
    problem = explain_loading(model, info)
    if problem is not None:
        raise ValueError(
            f"The language model under `{path}` is not the one that its config.json describes: {problem}. "
            "Type model.language_model.path=FOLDER with the weights as `save_pretrained` writes them"
        )
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False  # the file has a head of its own, whatever its config.json says
    if vocab_size > model.config.vocab_size:
        model.resize_token_embeddings(vocab_size)
    return model
