"""What a run would do, without doing it: settings, sizes, tokens, placement. Needs no cluster and writes nothing."""

import os
from pathlib import Path

import torch
import yaml

from minivlm import layout
from minivlm.config import STAGE_NAMES, Config, ConfigError, StageName
from minivlm.config.train import StageConfig
from minivlm.data.errors import DataError
from minivlm.data.pipeline import count_rows, load_token_counts, mixture_tables
from minivlm.data.settings import tower_shape
from minivlm.evaluation.benchmarks.load import count_rows as count_benchmark
from minivlm.evaluation.compare import check_names, choose_baseline
from minivlm.inference.exports import folder_export
from minivlm.model.image_tokens import count_image_tokens
from minivlm.model.language import build_language_model
from minivlm.model.llava import PROJECTOR_NOTE
from minivlm.model.lora import count_adapters
from minivlm.model.projector import build_projector
from minivlm.model.vlm import MiniVLM
from minivlm.train.initial import choose_learning
from minivlm.train.job import NUM_SAMPLED
from minivlm.train.placement import DATA_CPUS, check_placement

ROOM_FOR_TEXT = 256
"""Tokens that a message proposes beyond those of a picture."""


def describe(config: Config) -> str:
    """The resolved settings as YAML, then parameters, rows and tokens, what is evaluated, and what runs where."""
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    parts = ["# resolved settings", settings, *_parameters(config), "", *_rows(config), "", *_preferences(config)]
    return "\n".join([*parts, "", *_evaluation(config), "", *_placement(config)])


def _parameters(config: Config) -> list[str]:
    language = config.model.language_model
    (num_features, vision_size), note = _tower_shape(config)
    kind, sizes = config.model.projector, config.model.projector_sizes
    num_image_tokens = count_image_tokens(kind, num_features, sizes)
    if num_image_tokens >= config.model.max_length_tokens:
        raise ConfigError(
            f"a picture becomes {num_image_tokens} tokens, which leaves no room for text in model.max_length_tokens="
            f"{config.model.max_length_tokens}: type model.max_length_tokens={num_image_tokens + ROOM_FOR_TEXT}, or "
            + ("fewer model.resampler_queries" if kind == "resampler" else "model.projector=resampler")
        )
    lines = [
        "# parameters",
        f"vision tower     {config.clip.path or 'trained here'}, {num_features} features per picture, frozen{note}",
        f"projector        {kind}, {num_image_tokens} image tokens per picture",
    ]
    if not config.model.is_stock_llava:
        lines.append(f"export           not for plain transformers: {PROJECTOR_NOTE}")
    if language.path:
        lines.append(f"language model   {language.path}: counted when it is loaded")
        return [*lines, *(_learning(config, stage, None) for stage in STAGE_NAMES)]
    with torch.device("meta"):
        model = build_language_model(
            path=None,
            architecture=language.architecture,
            sizes=language.model_dump(exclude={"path", "architecture"}),
            vocab_size=config.tokenizer.vocab_size,
            seed=config.seed,
        )
        projector = build_projector(
            kind, vision_size, language.hidden_size, num_features=num_features, sizes=sizes, seed=config.seed
        )
    counts = [sum(p.numel() for p in part.parameters()) for part in (projector, model)]
    lines[2] += f", {counts[0]:,} parameters"
    lines.append(f"language model   {counts[1]:,} parameters ({language.architecture}, random)")
    lines.append(f"together         {sum(counts) / 1e6:.2f}M without the tower")
    vlm = MiniVLM(projector, model, image_token_id=0)
    return [*lines, *(_learning(config, stage, vlm) for stage in STAGE_NAMES)]


def _learning(config: Config, stage: StageName, vlm: MiniVLM | None) -> str:
    """What a stage trains, counted where the model is known before it is loaded.

    Raises:
        ConfigError: adapters for layers that the model does not have.
    """
    settings: StageConfig = getattr(config.train, stage)
    lora, what = settings.lora, ", ".join(settings.trainable)
    if "language_model.edges" in settings.trainable:
        what += f" ({settings.edge_layers} at each end)"
    if lora:
        base = "" if lora.quantization == "none" else f", base in {lora.quantization}"
        what += f" by adapters of rank {lora.rank}{base}"
    if vlm is None:
        return f"{stage + ' learns':<16} {what}"
    choose_learning(vlm, settings.trainable, settings.edge_layers)
    part = vlm.projector if lora else vlm
    count = sum(p.numel() for p in part.parameters() if p.requires_grad)
    try:
        count += count_adapters(vlm.language_model, lora.targets, lora.rank) if lora else 0
    except ValueError as error:
        raise ConfigError(f"train.{stage}.lora.targets: {error}") from None
    return f"{stage + ' learns':<16} {count:,}: {what}"


def _tower_shape(config: Config) -> tuple[tuple[int, int], str]:
    """(P, D) of the tower, and where they come from if not from its own settings: a dry run fetches nothing."""
    try:
        return tower_shape(config, local_files_only=True), ""
    except ValueError:
        if Path(str(config.clip.path)).is_dir():
            raise
        stated = config.clip.model_copy(update={"path": None})
        note = " (as clip.image_size_px, clip.patch_size_px and clip.vision_hidden_size say: it is not on this machine)"
        return tower_shape(config.model_copy(update={"clip": stated})), note


def _rows(config: Config) -> list[str]:
    lines = ["# rows and tokens"]
    measured = load_token_counts(config)
    try:
        counts = count_rows(config)
    except DataError as error:  # the plan is of use before the data is in its place
        return [*lines, f"not counted: {error}"]
    for stage, rows in counts.items():
        known = measured.get(stage)
        tokens = f"{known:,} tokens" if known else "tokens counted after `python -m jobs.prepare`"
        lines.append(f"{stage:<16} {rows:,} rows, {tokens}")
    return [*lines, *mixture_tables(config), *_benchmarks(config)]


def _benchmarks(config: Config) -> list[str]:
    """What would be asked of each file; pictures are opened only by the evaluation."""
    lines = ["", "# benchmarks"] if config.evaluation.benchmarks else []
    for benchmark in config.evaluation.benchmarks:
        try:
            rows, bad = count_benchmark(benchmark)
        except DataError as error:
            lines.append(f"{benchmark.task:<16} not counted: {error}")
            continue
        unfit = f", {bad} of them cannot be asked" if bad else ""
        lines.append(f"{benchmark.task:<16} {rows:,} rows{unfit}, read as {benchmark.kind}: {benchmark.path}")
    return lines


def _preferences(config: Config) -> list[str]:
    """Whom the preferences job asks, what it asks for, and what MPO starts from."""
    settings, policy = config.preferences, config.preferences.policy
    lines = ["# preferences"]
    if config.data.mpo:
        lines.append("pairs            those of data.mpo, as they are")
    else:
        asked = "as they are" if settings.prompt_style == "as_is" else f"asking for `{settings.prompt_style}`"
        lines.append(f"questions        {asked}, {settings.num_samples} answers each")
        sources = (*config.data.prompts, *config.data.sft)
        lines += [f"verifier         {one.verifier}: {one.path}" for one in sources if one.verifier != "exact"]
        if settings.dropout_ntp_tasks:
            tasks, kept = ", ".join(settings.dropout_ntp_tasks), settings.dropout_ntp_ratio
            lines.append(f"open questions   {tasks}: {kept:.0%} of each answer, continued without the picture")
    lines.append(f"answers          {policy or 'by the model after SFT'}; MPO starts from it")
    if policy is not None and not policy.expanduser().is_dir():
        lines.append(f"refused          no folder {policy}: type preferences.policy=EXPORT, as the mpo job printed it")
    folder = layout.pairs_dir(config)
    state = "finished" if (folder / "reference.json").exists() else "continues" if folder.exists() else "new"
    return [*lines, f"pairs            {state}: {folder}"]


def _evaluation(config: Config) -> list[str]:
    """Which models answer, in how many ways, and what stands against what.

    Raises:
        ConfigError: an export that is none, two models of one name, or a baseline that will not be evaluated.
    """
    settings = config.evaluation
    further = [folder_export(name, folder) for name, folder in settings.exports.items()]
    names = check_names([*STAGE_NAMES, *(export.name for export in further)])
    ways = [f"{name} ({settings.num_shots} examples)" if name == "few_shot" else name for name in settings.variants]
    lines = ["# evaluation", f"{'models':<16} the finished stages of {', '.join(STAGE_NAMES)}"]
    lines += [f"{'':<16} {export.name}: {export.export_dir}, content {export.reference}" for export in further]
    lines.append(f"{'asked':<16} as it is{''.join(f', {way}' for way in ways)}, in batches of {settings.batch_size}")
    return [*lines, f"{'compared with':<16} {choose_baseline(names, settings.baseline)}"]


def _placement(config: Config) -> list[str]:
    train, clip, evaluation, serve = config.train, config.clip, config.evaluation, config.serve
    device = "GPU, nccl" if train.use_gpu else "CPU, gloo"
    training = f"Ray Train workers, {device}, ZeRO-{train.zero_stage}, {train.precision}"
    streams = config.data.features == "stream"
    encoding = f"CLIP, {clip.encode_precision}, " + ("beside the trainers" if streams else "before training")
    rows = [
        ("encode", clip.num_encoders, clip.cpus_per_encoder, clip.gpus_per_encoder, encoding),
        ("train", train.num_workers, train.cpus_per_worker, int(train.use_gpu), training),
        ("answer", evaluation.num_actors, evaluation.cpus_per_actor, evaluation.gpus_per_actor, "generation actors"),
        ("tune", config.tune.max_concurrent_trials, train.cpus_per_worker, int(train.use_gpu), "trials at a time"),
        ("serve", serve.num_replicas, serve.cpus_per_replica, serve.gpus_per_replica, f"on {serve.host}:{serve.port}"),
    ]
    lines = ["# placement", f"{'step':<8}{'count':>6}{'CPUs each':>11}{'GPUs each':>11}  what"]
    lines += [f"{name:<8}{count:>6}{cpus:>11g}{gpus:>11g}  {what}" for name, count, cpus, gpus, what in rows]
    cluster = config.cluster.address or os.environ.get("RAY_ADDRESS")
    where = f"cluster {cluster}" if cluster else f"local cluster of {config.cluster.num_cpus or os.cpu_count()} CPUs"
    lines.append(f"on               {where}")
    again = "computed again" if train.gradient_checkpointing else "kept"
    lines.append(f"memory           activations {again}, offload to the host: {train.offload.replace('_', ' ')}")
    if train.sample_every_steps:
        lines.append(f"samples          {NUM_SAMPLED} validation questions every {train.sample_every_steps} steps")
    lines += _at_once(config, streams, is_local=not cluster)
    lines += [f"{stage:<16} {_state(layout.run_dir(config, stage))}" for stage in STAGE_NAMES]
    return lines


def _at_once(config: Config, streams: bool, *, is_local: bool) -> list[str]:
    """What a stage occupies at one time, and whether a local cluster has it."""
    train, clip = config.train, config.clip
    cpus = train.num_workers * train.cpus_per_worker + DATA_CPUS
    gpus = float(train.num_workers if train.use_gpu else 0)
    if streams:
        cpus += clip.num_encoders * clip.cpus_per_encoder
        gpus += clip.num_encoders * clip.gpus_per_encoder
    what = "trainers, encoders and data tasks" if streams else "trainers and data tasks"
    lines = [f"at once          {cpus:g} CPUs, {gpus:g} GPUs: {what} of a stage"]
    if is_local:
        present = float(config.cluster.num_cpus or os.cpu_count() or 1)
        try:
            check_placement(config, cpus=present, gpus=torch.cuda.device_count(), encoders_beside=streams)
        except ConfigError as error:
            lines.append(f"refused          {error}")
    return lines


def _state(run: Path) -> str:
    if (run / "result.json").exists():
        return f"finished, will not run again: {run}"
    return f"{'continues' if run.exists() else 'new'}: {run}"
