"""Adapters on the language model (peft): which layers get one, how they are put in, and how an export merges them.

Called by `minivlm.train.initial` and, for the sizes alone, by the dry run. Adapters leave the base weights as they are,
so a merged model is made from the base weights and the adapters' two factors: W + alpha / rank * B A.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

FACTOR_A, FACTOR_B = ".lora_A.default.weight", ".lora_B.default.weight"


def decoder_layers(language_model: PreTrainedModel) -> nn.ModuleList:
    """The language model's layers, in the order in which they run.

    Raises:
        ValueError: an architecture that has none.
    """
    lists = [child for child in language_model.get_decoder().children() if isinstance(child, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(language_model).__name__} has no list of layers: train all of it or none")
    return max(lists, key=len)


def adapted_layers(language_model: PreTrainedModel, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that get an adapter, by their names in the language model.

    Args:
        targets: last parts of their names (`q_proj`); only inside of the language model's layers.

    Raises:
        ValueError: a target that is no linear layer there.
    """
    inside = {id(module) for module in decoder_layers(language_model).modules() if isinstance(module, nn.Linear)}
    linear = {name: module for name, module in language_model.named_modules() if id(module) in inside}
    known = {name.rpartition(".")[2] for name in linear}
    if unknown := next((target for target in targets if target not in known), None):
        raise ValueError(
            f"no linear layer `{unknown}` in the layers of {type(language_model).__name__}: "
            f"type some of [{','.join(sorted(known))}]"
        )
    return {name: module for name, module in linear.items() if name.rpartition(".")[2] in targets}


def count_adapters(language_model: PreTrainedModel, targets: Sequence[str], rank: int) -> int:
    """Parameters of the adapters of `adapted_layers`: rank * (inputs + outputs) each."""
    layers = adapted_layers(language_model, targets).values()
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def add_adapters(
    language_model: PreTrainedModel, *, targets: Sequence[str], rank: int, alpha: int, dropout: float, seed: int
) -> None:
    """Freeze the language model and put trainable adapters into it; A is random from `seed`, B is 0, so that the
    model computes what it did.

    Raises:
        ValueError: as `adapted_layers`.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """
    from peft import LoraConfig, inject_adapter_in_model  # imports of its own that runs without adapters need not pay

    names = list(adapted_layers(language_model, targets))
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, language_model)


def merge_adapters(base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], *, scale: float) -> dict[str, Tensor]:
    """The adapted matrices with their adapters merged, by their names in `base`: W + scale * B A, float32.

    Args:
        base: weights of the model before adapters were added, by name.
        adapters: weights of the model with adapters; those that are no adapter's are passed over.
        scale: alpha / rank.
    """
    merged: dict[str, Tensor] = {}
    for name in adapters:
        stem = name.removesuffix(FACTOR_A)
        if stem != name:
            weight = base[f"{stem}.weight"]
            merged[f"{stem}.weight"] = weight + scale * (adapters[stem + FACTOR_B] @ adapters[name])
    return merged


def quantise(language_model: PreTrainedModel, *, compute_type: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The same model with the linear layers inside of its layers in 4 bits (NF4, its scales in 8 bits), on `device`.

    It has not been run: nowhere were both a CUDA device and bitsandbytes at hand.

    Raises:
        ValueError: no CUDA, or no bitsandbytes.

    Source: Dettmers et al. 2023, arXiv:2305.14314.
    """
    if device.type != "cuda":
        raise ValueError(f"4-bit weights need CUDA, but this worker computes on {device.type}: type none")
    if find_spec("bitsandbytes") is None:
        raise ValueError("4-bit weights need bitsandbytes on every worker: pip install bitsandbytes, or type none")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_type,
        llm_int8_skip_modules=["lm_head"],
    )
    with TemporaryDirectory() as folder:
        language_model.save_pretrained(folder)
        quantised: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="sdpa",
            quantization_config=config,
            device_map={"": device},
        )
    return quantised
