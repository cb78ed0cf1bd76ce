"""Our model as transformers' LLaVA: its configuration, its projector, and what to do with projectors that it has not.

Stock LLaVA has two linear layers with an activation between, one token per feature. `linear` and `mlp2x_gelu` fit into
that. Others are written under the same names, and config.json gets a model_type and an activation that transformers
does not know: so it refuses the folder instead of filling in random weights. Called by model/export.py.
"""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from minivlm.model.checkpoint import CheckpointError
from minivlm.model.image_tokens import CLASS_TOKENS, PROJECTOR_SIZES, count_features, count_image_tokens
from minivlm.model.loading import check_room, explain_loading
from minivlm.model.projector import LinearProjector, MlpProjector, Projector, build_projector, describe_projector
from minivlm.model.tokenizer import token_id
from minivlm.model.vlm import MiniVLM
from minivlm.schema import IMAGE_PLACEHOLDER
from minivlm.storage import write_json

OWN_MODEL_TYPE = "minivlm_llava"
"""model_type of an export with a projector that stock LLaVA has not."""

OWN_FIELD = "minivlm_projector"
"""Field of its config.json: {"kind": ..., and the sizes that the kind reads}."""

PROJECTOR_NOTE = (
    "LlavaForConditionalGeneration has no such projector; `minivlm.model.export.load_export`, evaluation and serving "
    "of this project read it. For a stock folder train with model.projector=mlp2x_gelu or model.projector=linear"
)
"""What to tell people about such an export."""


def is_stock(kind: str) -> bool:
    """True where plain transformers loads an export with this kind of projector."""
    return not PROJECTOR_SIZES[kind]


def llava_config(
    vlm: MiniVLM, vision: PreTrainedConfig, feature_layer: int, tokenizer: PreTrainedTokenizerFast
) -> LlavaConfig:
    """The stock configuration of the model with this tower.

    Raises:
        ValueError: the tokenizer has another image token than the model was trained with.
    """
    if token_id(tokenizer, IMAGE_PLACEHOLDER) != vlm.image_token_id:
        raise ValueError(
            f"the tokenizer's {IMAGE_PLACEHOLDER} is {token_id(tokenizer, IMAGE_PLACEHOLDER)}, but the model was "
            f"trained with {vlm.image_token_id}: export with the tokenizer of the training run"
        )
    language_model = vlm.language_model
    text = language_model.config.to_dict() | {
        "architectures": [type(language_model).__name__],
        "tie_word_embeddings": False,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    kind, sizes = describe_projector(vlm.projector)
    return LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text,
        image_token_index=vlm.image_token_id,
        image_seq_length=count_image_tokens(kind, count_features(vision), sizes),
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="full",
        projector_hidden_act="linear" if kind == "linear" else "gelu",
        multimodal_projector_bias=kind != "linear",
        tie_word_embeddings=False,
        dtype="float32",
    )


def attach_projector(config: LlavaConfig, projector: nn.Module) -> LlavaForConditionalGeneration:
    """A LLaVA without weights but for its projector: ours as LLaVA's two layers where it can be said so, else as it is.

    The linear kind gets an identity as its second layer, which is exact.
    """
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    if not isinstance(projector, LinearProjector | MlpProjector):
        llava.model.multi_modal_projector = projector
        return llava
    stock = LlavaMultiModalProjector(config)
    weights = dict(projector.state_dict())
    if isinstance(projector, LinearProjector):
        weights["linear_2.weight"] = torch.eye(stock.linear_2.out_features)
    stock.load_state_dict(weights)
    llava.model.multi_modal_projector = stock
    return llava


def write_own_settings(directory: Path, kind: str, sizes: dict[str, int]) -> None:
    """Say in config.json that the projector is none of LLaVA's, in a way that makes stock loaders stop."""
    path = directory / "config.json"
    own = {"model_type": OWN_MODEL_TYPE, "architectures": ["MiniVLM"], "projector_hidden_act": kind}
    write_json(path, json.loads(path.read_text()) | own | {OWN_FIELD: {"kind": kind, **sizes}})


def read_llava_config(directory: Path) -> tuple[LlavaConfig, bool]:
    """Settings of an export, and whether plain transformers loads it. If not, they hold `OWN_FIELD`.

    Raises:
        CheckpointError: no config.json, none that this project or LLaVA wrote, or a tower that we do not run.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} is no export: it has no config.json")
    try:
        settings = dict(json.loads(path.read_text()))
        is_plain = settings.get("model_type") != OWN_MODEL_TYPE
        if is_plain:
            config = LlavaConfig.from_pretrained(str(directory), local_files_only=True)
        else:
            kind, sizes = _own_projector(settings[OWN_FIELD])
            stock = {"model_type": "llava", "projector_hidden_act": "gelu"}
            config = LlavaConfig.from_dict(settings | stock | {OWN_FIELD: {"kind": kind, **sizes}})
        if config.vision_config.model_type not in CLASS_TOKENS:
            raise ValueError(f"its tower is a `{config.vision_config.model_type}`, neither CLIP nor SigLIP")
        count_features(config.vision_config)
        layer = config.vision_feature_layer
        if config.vision_feature_select_strategy != "full" or not isinstance(layer, int) or layer >= 0:
            raise ValueError("only one negative vision_feature_layer with strategy `full` is supported")
    except Exception as error:  # transformers and what it calls raise anything at a strange config.json
        raise CheckpointError(f"{path} describes no model of this project: {error!r}") from error
    return config, is_plain


def _own_projector(field: dict[str, int | str]) -> tuple[str, dict[str, int]]:
    """Kind and sizes, checked: they come from a file."""
    kind = str(field["kind"])
    sizes = {name: int(field[name]) for name in PROJECTOR_SIZES[kind]}
    if any(size < 1 for size in sizes.values()):
        raise ValueError(f"{sizes}: sizes start at 1")
    return kind, sizes


def load_llava(directory: Path) -> tuple[LlavaForConditionalGeneration, int]:
    """The model with its projector, and the number of its weights, after a strict report.

    Raises:
        CheckpointError: no export, weights missing or left over, or an architecture that we do not run.
    """
    config, is_plain = read_llava_config(directory)
    model_class = LlavaForConditionalGeneration if is_plain else OwnLlava
    parts = (config.vision_config, config.text_config)
    num_layers = sum(part.num_hidden_layers for part in parts)
    num_layers += 0 if is_plain else config.minivlm_projector.get("resampler_layers", 0)
    try:
        check_room(directory, parts, num_layers, lambda: model_class(config))
        llava, info = model_class.from_pretrained(
            str(directory),
            config=config,
            key_mapping=None if is_plain else {"^language_model.lm_head": "lm_head"},
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
        )
    except Exception as error:  # as above: sizes, activations and quantizations that there are not
        raise CheckpointError(f"{directory} cannot be loaded: {error!r}") from error
    problem = explain_loading(llava, info)
    if problem is not None:
        raise CheckpointError(f"{directory}: {problem}")
    return llava, len(llava.state_dict())


def read_projector(llava: LlavaForConditionalGeneration, directory: Path) -> Projector:
    """The projector of a loaded model as one of ours.

    Raises:
        CheckpointError: a stock projector that is none of ours.
    """
    found, config = llava.model.multi_modal_projector, llava.config
    if not isinstance(found, LlavaMultiModalProjector):
        own = _like(config, *describe_projector(found))
        own.load_state_dict(found.state_dict())
        return own
    sizes = (found.linear_1.in_features, found.linear_1.out_features)
    kind = (config.projector_hidden_act, config.multimodal_projector_bias)
    projector: LinearProjector | MlpProjector
    if kind == ("gelu", True):
        projector = MlpProjector(*sizes)
        projector.load_state_dict(found.state_dict())
    elif kind == ("linear", False) and torch.equal(found.linear_2.weight, torch.eye(sizes[1])):
        projector = LinearProjector(*sizes)
        projector.load_state_dict({"linear_1.weight": found.linear_1.weight})
    else:
        raise CheckpointError(f"{directory}: a projector with (activation, bias) = {kind} is none of ours")
    return projector


class OwnLlava(LlavaForConditionalGeneration):
    """LLaVA with the projector that `OWN_FIELD` of its configuration describes.

    transformers keeps its table of hub names from classes of others, so loading names the head itself.
    """

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        own = dict(config.minivlm_projector)
        self.model.multi_modal_projector = _like(config, own.pop("kind"), own)


def _like(config: LlavaConfig, kind: str, sizes: dict[str, int]) -> Projector:
    vision, text_size = config.vision_config, config.text_config.hidden_size
    return build_projector(kind, vision.hidden_size, text_size, num_features=count_features(vision), sizes=sizes)
