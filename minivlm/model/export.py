"""The inference export: a stock `LlavaForConditionalGeneration` folder that needs none of our code, and its reader.

    config.json generation_config.json model.safetensors processor_config.json preprocessor_config.json
    tokenizer.json tokenizer_config.json chat_template.jinja minivlm.json (whether the head was tied)

Projectors that the stock class has not (model/llava.py) are written into the same files, and only this reads them.
Weights are written under the hub's names (`vision_tower.vision_model...`), which transformers 5.23 itself does not.
Only safetensors and JSON are written or read. Called by training at each checkpoint, and by evaluation and serving.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from minivlm.model.checkpoint import CheckpointError
from minivlm.model.image_tokens import CLASS_TOKENS, count_features, count_image_tokens
from minivlm.model.llava import (
    attach_projector,
    is_stock,
    llava_config,
    load_llava,
    read_llava_config,
    read_projector,
    write_own_settings,
)
from minivlm.model.loading import check_room, compare_weights
from minivlm.model.projector import describe_projector
from minivlm.model.tokenizer import load_tokenizer
from minivlm.model.vision import VisionTower, load_vision_model, vision_classes
from minivlm.model.vlm import MiniVLM
from minivlm.storage import write_json

OWN_FILE = "minivlm.json"
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
        tower_path, feature_layer: tower's folder or hub id, and its layer, as `VisionTower.load` reads them.
        tokenizer_dir: folder or hub id, as `load_tokenizer` reads it.

    Raises:
        ValueError: weights that are not float32, no such tower or tokenizer, or a tokenizer of another run.
    """
    if any(parameter.dtype != torch.float32 for parameter in vlm.parameters()):
        raise ValueError("an export holds float32 weights: gather the engine's float32 copy into the model first")
    tower, image_processor = load_vision_model(tower_path)
    tokenizer = load_tokenizer(tokenizer_dir)
    config = llava_config(vlm, tower.config, feature_layer, tokenizer)
    llava = attach_projector(config, vlm.projector)
    llava.model.vision_tower = tower
    llava.model.language_model = vlm.language_model.get_decoder()
    llava.lm_head.weight = nn.Parameter(vlm.language_model.get_output_embeddings().weight.detach().clone())
    llava.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    directory.mkdir(parents=True, exist_ok=True)
    llava.save_pretrained(str(directory), max_shard_size=ONE_FILE)
    _use_hub_names(directory)
    kind, sizes = describe_projector(vlm.projector)
    if not is_stock(kind):
        write_own_settings(directory, kind, sizes)
    patches = count_features(tower.config) - CLASS_TOKENS[tower.config.model_type]
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=config.image_seq_length - patches,  # its rule: patches and so many more
        chat_template=tokenizer.chat_template,
    ).save_pretrained(str(directory))
    image_processor.save_pretrained(str(directory))
    write_json(directory / OWN_FILE, {"tie_word_embeddings": vlm.language_model.config.tie_word_embeddings})


def load_export(directory: Path) -> Export:
    """Read an export (or any stock LLaVA folder with a CLIP or SigLIP tower, one layer, strategy `full`) in float32.

    Raises:
        CheckpointError: no export, weights missing or left over, or an architecture that we do not run.
    """
    llava, num_keys = load_llava(directory)
    tokenizer = load_tokenizer(directory)
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(llava.config.text_config, attn_implementation="sdpa")
    language_model.model = llava.model.language_model
    language_model.lm_head = llava.lm_head
    if _is_tied(directory):
        _tie(language_model, directory)
    projector = read_projector(llava, directory)
    vlm = MiniVLM(projector, language_model, llava.config.image_token_index).eval()
    kind, sizes = describe_projector(projector)
    num_image_tokens = count_image_tokens(kind, count_features(llava.config.vision_config), sizes)
    return Export(vlm, tokenizer, llava.config.image_token_index, num_image_tokens, num_keys)


def load_export_tower(
    directory: Path, *, precision: str = "float32", batch_size: int, device: str = "cpu"
) -> VisionTower:
    """The vision tower of an export; its fingerprint is that of the tower that was exported.

    Raises:
        CheckpointError: no export, or tower weights missing or left over.
    """
    try:
        config, _ = read_llava_config(directory)
        model_class, processor_class = vision_classes(config.vision_config)
        image_processor = processor_class.from_pretrained(str(directory), local_files_only=True)
        vision, weights = config.vision_config, _vision_weights(directory)
        check_room(directory, [vision], vision.num_hidden_layers, lambda: model_class(vision))
        model = model_class(vision)
        problem = compare_weights(weights, model.state_dict())
        if problem is not None:
            raise ValueError(problem)
        model.load_state_dict(weights)
        return VisionTower(
            model,
            image_processor,
            precision=precision,
            feature_layer=config.vision_feature_layer,
            batch_size=batch_size,
            device=device,
        )
    except Exception as error:  # transformers raises anything at strange settings
        raise CheckpointError(f"{directory} holds no complete vision tower: {error}") from error


def _is_tied(directory: Path) -> bool:
    """What `OWN_FILE` says of the head; a stock folder has none."""
    path = directory / OWN_FILE
    if not path.exists():
        return False
    try:
        is_tied = json.loads(path.read_text())["tie_word_embeddings"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} does not say whether the head is tied: {error!r}") from error
    return bool(is_tied)


def _tie(language_model: PreTrainedModel, directory: Path) -> None:
    """Make head and embedding one parameter again, as they were in training."""
    embedding = language_model.get_input_embeddings().weight
    if not torch.equal(language_model.get_output_embeddings().weight, embedding):
        raise CheckpointError(f"{directory}: {OWN_FILE} says that the head is tied, but it differs from the embedding")
    language_model.get_output_embeddings().weight = embedding
    language_model.config.tie_word_embeddings = True


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
