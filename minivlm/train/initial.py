"""The model that a stage trains: where its weights come from, which of them learn, and what of it is exported.

Called by `minivlm.train.loop` in each worker; the dry run counts with `choose_learning`.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from minivlm.config.train import LoraConfig
from minivlm.data.features import FeatureCache
from minivlm.model.export import load_export
from minivlm.model.fast_layers import compile_model, use_segment_attention
from minivlm.model.language import build_language_model
from minivlm.model.lora import add_adapters, decoder_layers, merge_adapters, quantise
from minivlm.model.projector import build_projector, whiten_input
from minivlm.model.vlm import MiniVLM
from minivlm.train.job import StageJob, whitening_pictures
from minivlm.train.lanes import refuse_randomness
from minivlm.train.stages import TrainingError


def initial_model(job: StageJob) -> MiniVLM:
    """Weights that the stage starts from: the previous stage's export, or a language model and a new projector."""
    if job.initial_export is not None:
        return load_export(job.initial_export).vlm
    language = job.config.model.language_model
    language_model = build_language_model(
        path=language.path,
        architecture=language.architecture,
        sizes=language.model_dump(exclude={"path", "architecture"}),
        vocab_size=job.vocab_size,
        seed=job.config.seed,
    )
    text_size = language_model.config.get_text_config().hidden_size
    projector = build_projector(
        job.config.model.projector,
        job.vision_size,
        text_size,
        num_features=job.num_features,
        sizes=job.config.model.projector_sizes,
        seed=job.config.seed,
    )
    digests = whitening_pictures(job.train_table, job.num_features)
    if digests:
        whiten_input(projector, FeatureCache.open(job.features_dir).get(digests))
    return MiniVLM(projector, language_model, job.image_token_id)


def prepare_model(model: MiniVLM, job: StageJob, device: torch.device) -> None:
    """Make of the initial weights what the stage trains: frozen parts, adapters, dropout, checkpointed and compiled
    layers, attention sample by sample.

    Raises:
        TrainingError: the language model cannot be trained as the settings say.
    """
    train, settings = job.config.train, job.settings
    stage = f"train.{job.stage}"
    key = f"{stage}.trainable"
    try:
        choose_learning(model, settings.trainable, settings.edge_layers)
        lora = settings.lora
        if lora is not None and lora.quantization == "nf4":
            key = f"{stage}.lora.quantization"
            precision = torch.bfloat16 if train.precision == "bfloat16" else torch.float32
            model.language_model = quantise(model.language_model, compute_type=precision, device=device)
        if settings.attention_dropout:
            key = f"{stage}.attention_dropout"
            _set_attention_dropout(model, settings.attention_dropout)
        if lora is not None:
            key = f"{stage}.lora.targets"
            add_adapters(
                model.language_model,
                targets=lora.targets,
                rank=lora.rank,
                alpha=lora.alpha,
                dropout=lora.dropout,
                seed=job.config.seed,
            )
        if train.parallel_micro_batches > 1:
            key = "train.parallel_micro_batches"
            refuse_randomness(model)
        if train.gradient_checkpointing:
            key = "train.gradient_checkpointing"
            model.language_model.activation_checkpointing_enable({"use_reentrant": False})
            model.language_model.disable_input_require_grads()  # only reentrant checkpoints need them
        if train.compile:
            key = "train.compile"
            compile_model(model, device)
    except ValueError as error:
        raise TrainingError(f"{key}: {error}") from error
    use_segment_attention(model)
    model.returns_mean_logps = settings.label_smoothing > 0


def choose_learning(model: MiniVLM, parts: Sequence[str], edge_layers: int) -> None:
    """Let the listed parts learn and freeze all else.

    Args:
        parts: of `projector`, `language_model` and `language_model.edges`: its first and last layers, without the
            embedding, the head (which may be tied to it) and the last norm.
        edge_layers: layers at each end.

    Raises:
        ValueError: the edges would be all layers.
    """
    model.projector.requires_grad_("projector" in parts)
    model.language_model.requires_grad_("language_model" in parts)
    if "language_model.edges" in parts:
        layers = decoder_layers(model.language_model)
        if 2 * edge_layers >= len(layers):
            raise ValueError(
                f"edge_layers={edge_layers} at each end are all of the {len(layers)} layers: type language_model"
            )
        for layer in [*layers[:edge_layers], *layers[-edge_layers:]]:
            layer.requires_grad_(True)


def _set_attention_dropout(model: MiniVLM, share: float) -> None:
    """The stock classes read it from this attribute; their config, which the export holds, stays as it is."""
    modules = [module for module in model.language_model.modules() if "attention_dropout" in vars(module)]
    if not modules:
        raise ValueError(f"{type(model.language_model).__name__} has no attention dropout: type 0")
    for module in modules:
        module.attention_dropout = share


def exported_model(initial: MiniVLM, weights: Mapping[str, Tensor], lora: LoraConfig | None) -> MiniVLM:
    """The model to export: `initial` with the weights that were learned, adapters merged.

    Args:
        initial: as `initial_model` made it, on the CPU. Without adapters it is changed and returned, with them it
            stays the base of the next export.
        weights: by name in the training model; all of them, or with adapters those that learn.
    """
    names = {name for name, _ in initial.named_parameters()}
    if lora is None:
        assert set(weights) == names
        initial.load_state_dict(weights, strict=False)  # a tied head is in it once
        return initial
    model = copy.deepcopy(initial)
    merged = merge_adapters(model.state_dict(), weights, scale=lora.alpha / lora.rank)
    learned = {name: weight for name, weight in weights.items() if name in names}
    model.load_state_dict({**learned, **merged}, strict=False)
    return model
