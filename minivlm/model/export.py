"""The inference export: a stock `LlavaForConditionalGeneration` folder that needs none of our code, and its reader.

    config.json generation_config.json model.safetensors processor_config.json preprocessor_config.json
    tokenizer.json tokenizer_config.json chat_template.jinja minivlm.json (whether the head was tied)

Weights are written under the hub's names (`vision_tower.vision_model...`), which transformers 5.23 itself does not.
Only safetensors and JSON are written or read. Called by training at each checkpoint, and by evaluation and serving.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from minivlm.model.checkpoint import CheckpointError
from minivlm.model.projector import LinearProjector, MlpProjector
from minivlm.model.tokenizer import load_tokenizer, token_id
from minivlm.model.vision import VisionTower, load_clip_vision
from minivlm.model.vlm import MiniVLM
from minivlm.schema import IMAGE_PLACEHOLDER
from minivlm.storage import write_json

OWN_FILE = "minivlm.json"
CLASS_TOKEN = 1
ONE_FILE = "1000GB"
HUB_VISION_PREFIX = "vision_tower.vision_model."


@dataclass(frozen=True)
class Export:
    """What `load_export` returns."""

    vlm: MiniVLM
    tokenizer: PreTrainedTokenizerFast
    image_token_id: int
    num_image_tokens: int
    """Placeholder tokens of one picture."""

    matched_keys: int
    """Weights that were read; none was missing or unexpected."""


def save_export(
    directory: Path, vlm: MiniVLM, *, tower_path: str, feature_layer: int = -1, tokenizer_dir: Path
) -> None:
    """Write the export of `vlm` (whole weights on the CPU) with the tower and the tokenizer that it was trained with.

    Args:
        tower_path, feature_layer: CLIP folder or hub id, and its layer, as `VisionTower.load` reads them.
        tokenizer_dir: folder or hub id, as `load_tokenizer` reads it.

    Raises:
        ValueError: weights that are not float32, no such tower or tokenizer, or a projector unknown to stock LLaVA.
    """
    if any(parameter.dtype != torch.float32 for parameter in vlm.parameters()):
        raise ValueError("an export holds float32 weights: gather the engine's float32 copy into the model first")
    tower, image_processor = load_clip_vision(tower_path)
    tokenizer = load_tokenizer(tokenizer_dir)
    config = _llava_config(vlm, tower, feature_layer, tokenizer)
    projector = _stock_projector(vlm.projector, config)
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower = tower
    llava.model.multi_modal_projector = projector
    llava.model.language_model = vlm.language_model.get_decoder()
    llava.lm_head.weight = nn.Parameter(vlm.language_model.get_output_embeddings().weight.detach().clone())
    llava.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    directory.mkdir(parents=True, exist_ok=True)
    llava.save_pretrained(str(directory), max_shard_size=ONE_FILE)
    _use_hub_names(directory)
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=CLASS_TOKEN,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(str(directory))
    image_processor.save_pretrained(str(directory))
    write_json(directory / OWN_FILE, {"tie_word_embeddings": vlm.language_model.config.tie_word_embeddings})


def load_export(directory: Path) -> Export:
    """Read an export (or any stock LLaVA folder with a CLIP tower, one layer, strategy `full`) in float32.

    Raises:
        CheckpointError: no export, weights missing or left over, or an architecture that we do not run.
    """
    llava, num_keys = _load_llava(directory)
    tokenizer = load_tokenizer(directory)
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(llava.config.text_config, attn_implementation="sdpa")
    language_model.model = llava.model.language_model
    language_model.lm_head = llava.lm_head
    own_file = directory / OWN_FILE
    if own_file.exists() and json.loads(own_file.read_text())["tie_word_embeddings"]:
        _tie(language_model, directory)
    projector = _own_projector(llava, directory)
    vlm = MiniVLM(projector, language_model, llava.config.image_token_index).eval()
    vision = llava.config.vision_config
    num_image_tokens = (vision.image_size // vision.patch_size) ** 2 + CLASS_TOKEN
    return Export(vlm, tokenizer, llava.config.image_token_index, num_image_tokens, num_keys)


def load_export_tower(
    directory: Path, *, precision: str = "float32", batch_size: int, device: str = "cpu"
) -> VisionTower:
    """The vision tower of an export; its fingerprint is that of the tower that was exported.

    Raises:
        CheckpointError: no export, or tower weights missing or left over.
    """
    try:
        config = LlavaConfig.from_pretrained(str(directory), local_files_only=True)
        image_processor = CLIPImageProcessorPil.from_pretrained(str(directory), local_files_only=True)
        model = CLIPVisionModel(config.vision_config)
        model.load_state_dict(_vision_weights(directory))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} holds no complete vision tower: {error}") from error
    return VisionTower(
        model,
        image_processor,
        precision=precision,
        feature_layer=config.vision_feature_layer,
        batch_size=batch_size,
        device=device,
    )


def _llava_config(
    vlm: MiniVLM, tower: CLIPVisionModel, feature_layer: int, tokenizer: PreTrainedTokenizerFast
) -> LlavaConfig:
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
    is_linear = isinstance(vlm.projector, LinearProjector)
    return LlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=text,
        image_token_index=vlm.image_token_id,
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2 + CLASS_TOKEN,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="full",
        projector_hidden_act="linear" if is_linear else "gelu",
        multimodal_projector_bias=not is_linear,
        tie_word_embeddings=False,
        dtype="float32",
    )


def _stock_projector(projector: nn.Module, config: LlavaConfig) -> LlavaMultiModalProjector:
    """Our projector as LLaVA's two layers; the linear kind gets an identity as its second, which is exact."""
    stock = LlavaMultiModalProjector(config)
    weights = dict(projector.state_dict())
    if isinstance(projector, LinearProjector):
        weights["linear_2.weight"] = torch.eye(stock.linear_2.out_features)
    elif not isinstance(projector, MlpProjector):
        raise ValueError(f"a stock LLaVA folder cannot express the projector {type(projector).__name__}")
    stock.load_state_dict(weights)
    return stock


def _own_projector(llava: LlavaForConditionalGeneration, directory: Path) -> LinearProjector | MlpProjector:
    stock, config = llava.model.multi_modal_projector, llava.config
    sizes = (stock.linear_1.in_features, stock.linear_1.out_features)
    kind = (config.projector_hidden_act, config.multimodal_projector_bias)
    projector: LinearProjector | MlpProjector
    if kind == ("gelu", True):
        projector = MlpProjector(*sizes)
        projector.load_state_dict(stock.state_dict())
    elif kind == ("linear", False) and torch.equal(stock.linear_2.weight, torch.eye(sizes[1])):
        projector = LinearProjector(*sizes)
        projector.load_state_dict({"linear_1.weight": stock.linear_1.weight})
    else:
        raise CheckpointError(f"{directory}: a projector with (activation, bias) = {kind} is none of ours")
    return projector


def _tie(language_model: PreTrainedModel, directory: Path) -> None:
    """Make head and embedding one parameter again, as they were in training."""
    embedding = language_model.get_input_embeddings().weight
    if not torch.equal(language_model.get_output_embeddings().weight, embedding):
        raise CheckpointError(f"{directory}: {OWN_FILE} says that the head is tied, but it differs from the embedding")
    language_model.get_output_embeddings().weight = embedding
    language_model.config.tie_word_embeddings = True


def _load_llava(directory: Path) -> tuple[LlavaForConditionalGeneration, int]:
    """The stock model and the number of its weights, after a strict report."""
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} is no export: it has no config.json")
    try:
        llava, report = LlavaForConditionalGeneration.from_pretrained(
            str(directory),
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be loaded: {error}") from error
    num_keys = len(llava.state_dict())
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    mismatched = sorted(str(key) for key in report["mismatched_keys"])
    if missing or unexpected or mismatched:
        raise CheckpointError(
            f"{directory}: {num_keys - len(missing)} weights matched, {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, mismatched {mismatched[:3]}"
        )
    config = llava.config
    layer = config.vision_feature_layer
    if config.vision_feature_select_strategy != "full" or not isinstance(layer, int) or layer >= 0:
        raise CheckpointError(f"{directory}: only one negative vision_feature_layer with strategy `full` is supported")
    if not isinstance(llava.model.vision_tower, CLIPVisionModel):
        raise CheckpointError(f"{directory}: the vision tower is {config.vision_config.model_type}, not CLIP")
    return llava, num_keys


def _use_hub_names(directory: Path) -> None:
    """Rename the tower's weights to the layout that every LLaVA on the hub has."""
    path = directory / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    renamed = {
        HUB_VISION_PREFIX + bare if (bare := name.removeprefix("vision_tower.")) != name else name: tensor
        for name, tensor in tensors.items()
    }
    temporary = path.with_suffix(".renamed")
    save_file(renamed, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def _vision_weights(directory: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(HUB_VISION_PREFIX)]  # noqa: SIM118
            weights |= {name.removeprefix(HUB_VISION_PREFIX): file.get_tensor(name) for name in names}
    return weights
