"""Settings: defaults, overrides, and errors that say what to type."""

from pathlib import Path

import pytest

from minivlm import layout
from minivlm.config import Config, ConfigError, load_config
from minivlm.config.base import cpu_has_bfloat16
from minivlm.config.train import TrainConfig

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty.yaml"
    path.write_text(f"storage_path: {tmp_path}\n")
    return path


def test_override_replaces_one_value(empty):
    settings = load_config(empty, ["train.sft.learning_rate=3e-4", "clip.path=openai/clip-vit-base-patch32"])
    assert settings.train.sft.learning_rate == 3e-4
    assert settings.clip.path == "openai/clip-vit-base-patch32"
    assert settings.train.mpo == Config().train.mpo


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.mpo.bata=0.2", "Unknown setting `train.mpo.bata`. Did you mean `beta`"),
        ("trian.mpo.beta=0.2", "Did you mean `train`"),
        ("train.sft.epochs=0", "train.sft.epochs: Input should be greater than 0"),
        ("train.mpo.beta", "type key.path=value"),
        ("seed.x=1", "is a value, not a group"),
        ("seed=[1", "not YAML"),
        ("data.val_fraction=0.97", "leave no training rows"),
        ("clip.patch_size_px=15", "multiple of clip.patch_size_px"),
        ("model.projector=qformer", "pixel_shuffle' or 'resampler'"),
        ("model={projector: pixel_shuffle, pixel_shuffle_factor: 4}", "does not fit into 3 x 3 patches: type model."),
        ("model={projector: resampler, resampler_heads: 5}", "type model.resampler_heads=4"),
    ],
)
def test_wrong_override_says_what_to_type(empty, override, message):
    overrides = ["seed=1", override] if override.startswith("seed.") else [override]
    with pytest.raises(ConfigError) as caught:
        load_config(empty, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sft.0.wieght=2", "Unknown setting `data.sft.0.wieght`. Did you mean `weight`"),
        ("data.mixture.sft.duplicate=drop_near", "Did you mean `duplicates`"),
        ("data.mixture.stf.seed=1", "Did you mean `sft`"),
        ("data.video_rules=scene", "Did you mean `video_rule`"),
        ("data.sft.1.weight=2", "`data.sft` is a list of 1 item(s), counted from 0"),
        ("data.sft.last.weight=2", "`data.sft` is a list of 1 item(s), counted from 0"),
        ("data.sft.0.min_rating.quality=high", "data.sft.0.min_rating.quality: Input should be a valid number"),
        ("data.mixture.sft.task_exponent=0.5", "data.mixture.sft: task_exponent says how tasks grow above"),
        ("data.mixture.sft.across_pictures=true", "set duplicates, too, to drop_near"),
        ("data.mixture.mpo.seed=3", "data.mpo, which lists no source"),
        ("data.mixture.prompts.seed=3", "set that instead"),
    ],
)
def test_wrong_settings_of_sources_and_mixtures_say_what_to_type(empty, override, message):
    empty.write_text("data: {pretrain: [{path: a.json}], sft: [{path: b.json}]}")
    with pytest.raises(ConfigError) as caught:
        load_config(empty, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_override_reaches_an_item_of_a_list_by_its_number(empty):
    empty.write_text("data: {pretrain: [{path: a.json}], sft: [{path: b.json}, {path: c.json}]}")
    data = load_config(
        empty, ["data.sft.1.weight=2", "data.sft.0.min_rating.quality=3", "data.pretrain.0={path: d}"]
    ).data
    assert ([source.weight for source in data.sft], data.sft[0].min_rating) == ([None, 2.0], {"quality": 3.0})
    assert data.pretrain[0].path == "d"


def test_missing_file_names_a_file_that_exists(tmp_path):
    with pytest.raises(ConfigError, match=r"configs/tiny\.yaml"):
        load_config(tmp_path / "none.yaml")


def test_all_loss_weights_zero_is_refused(empty):
    zero = [f"train.mpo.{name}_weight=0" for name in ("dpo", "bco", "sft")]
    with pytest.raises(ConfigError, match=r"train\.mpo\.dpo_weight=0\.8"):
        load_config(empty, zero)


SIDE_BY_SIDE = ("train.zero_stage=0", "train.threads_per_worker=2", "train.parallel_micro_batches=2")
LORA = "train.sft.lora={rank: 8}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.sft.trainable=[]"], "train.sft.trainable: Tuple should have at least 1 item"),
        (["train.sft.trainable=[language_model,language_model.edges]"], "type train.sft.trainable=[projector]"),
        (["train.sft.trainable=[language_model.edges]", "train.sft.edge_layers=2"], "all of the 4 layers"),
        ([LORA, "train.sft.trainable=[projector]"], "type train.sft.trainable=[projector,language_model]"),
        ([LORA, "train.sft.muon_learning_rate=0.02"], "type train.sft.muon_learning_rate=0, or train.sft.lora=null"),
        (["train.sft.lora={quantization: nf4}"], "train.sft.lora.quantization=nf4 needs CUDA"),
        (["train.sft.lora={quantization: nf4}", "train.use_gpu=true", "train.zero_stage=3"], "train.zero_stage=2"),
        (["train.mpo.lora={quantization: nf4}", "train.use_gpu=true"], "reference log-probabilities are those"),
        (["train.mpo.lora={dropout: 0.1}"], "type train.mpo.lora.dropout=0"),
        (["train.mpo.attention_dropout=0.1"], "type train.mpo.attention_dropout=0"),
        (["train.mpo.label_smoothing=0.1"], "type train.mpo.label_smoothing=0"),
        (["train.parallel_micro_batches=2"], "type train.zero_stage=0, or train.parallel_micro_batches=1"),
        (["train.zero_stage=0", "train.parallel_micro_batches=2"], "type train.threads_per_worker=2"),
        (["train.use_gpu=true", "train.zero_stage=0", "train.parallel_micro_batches=2"], "is for CPUs"),
        ([*SIDE_BY_SIDE, "train.sft.attention_dropout=0.1"], "type train.sft.attention_dropout=0, or"),
        ([*SIDE_BY_SIDE, "train.sft.lora={dropout: 0.1}"], "type train.sft.lora.dropout=0, or"),
        (["train.offload=optimizer"], "type train.offload=none, or train.use_gpu=true"),
        (["train.offload=optimizer", "train.use_gpu=true", "train.zero_stage=0"], "type train.zero_stage=2"),
        (["train.offload=optimizer_and_parameters", "train.use_gpu=true"], "type train.zero_stage=3"),
        (
            ["train.offload=optimizer", "train.use_gpu=true", "train.sft.muon_learning_rate=0.02"],
            "type train.sft.muon_learning_rate=0",
        ),
        (
            ["train.sft.schedule=wsd", "train.sft.warmup_fraction=0.5", "train.sft.decay_fraction=0.6"],
            "type train.sft.decay_fraction=0.5",
        ),
    ],
)
def test_training_settings_that_do_not_go_together_say_what_to_type(empty, overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config(empty, overrides)
    assert message in str(caught.value)
    assert '(got "{' not in str(caught.value)  # the whole tree would stand behind what to type


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_preset_loads(path):
    assert load_config(path).root.is_absolute()


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("train.mpo.beta=0.2", {"mpo"}),
        ("train.sft.epochs=7", {"sft", "mpo"}),
        ("model.projector=linear", {"pretrain", "sft", "mpo"}),
        ("model.pixel_shuffle_factor=3", {"pretrain", "sft", "mpo"}),
        ("model.resampler_queries=9", {"pretrain", "sft", "mpo"}),
        ("clip.path=google/siglip-base-patch16-224", {"pretrain", "sft", "mpo"}),
        ("seed=5", {"pretrain", "sft", "mpo"}),
        ("serve.port=9000", set()),
        ("train.threads_per_worker=2", set()),
        ("train={zero_stage: 0, threads_per_worker: 2, parallel_micro_batches: 2}", set()),
    ],
)
def test_a_setting_moves_the_runs_that_it_determines(empty, override, changed):
    before, after = load_config(empty), load_config(empty, [override])
    stages = ("pretrain", "sft", "mpo")
    assert {s for s in stages if layout.run_dir(before, s) != layout.run_dir(after, s)} == changed


def test_an_edited_source_file_is_new_data(empty, tmp_path):
    source = tmp_path / "rows.json"
    source.write_text("[]")
    overrides = [f"data.pretrain=[{{path: {source}}}]", f"data.sft=[{{path: {source}}}]"]
    before = layout.samples_dir(load_config(empty, overrides))
    source.write_text("[ ]")
    assert layout.samples_dir(load_config(empty, overrides)) != before


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize(
    ("values", "on_fast", "on_slow"),
    [
        ({"precision": "auto"}, "bfloat16", "float32"),
        ({"precision": "auto", "use_gpu": True}, "bfloat16", "bfloat16"),
        ({"precision": "float32"}, "float32", "float32"),
        ({"precision": "bfloat16"}, "bfloat16", "bfloat16"),
    ],
)
def test_automatic_precision_follows_the_hardware(monkeypatch, has_bfloat16, values, on_fast, on_slow):
    monkeypatch.setattr("minivlm.config.train.cpu_has_bfloat16", lambda: has_bfloat16)
    assert TrainConfig(**values).precision == (on_fast if has_bfloat16 else on_slow)


@pytest.mark.parametrize(
    ("flags", "expected"), [("fma avx2", False), ("avx512f avx512_bf16", True), ("bf16 i8mm", True)]
)
def test_bfloat16_is_read_off_the_cpu(monkeypatch, flags, expected):
    monkeypatch.setattr(Path, "read_text", lambda self: f"flags : {flags}\n")
    assert cpu_has_bfloat16() is expected


@pytest.mark.parametrize("content", [None, b"\xff\xfe seed: 1"])
def test_what_is_no_text_file_is_one_clear_error(tmp_path, content):
    path = tmp_path / "a.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.yaml cannot be read as a text file"):
        load_config(path)


def test_sources_that_would_be_left_unread_are_refused():
    with pytest.raises(ConfigError, match="needed together"):
        load_config(CONFIGS / "tiny.yaml", ["data.prompts=[{path: p.json}]"])
    mine = ["data.pretrain=[{path: a.json}]", "data.sft=[{path: a.json}]"]
    with pytest.raises(ConfigError, match=r"pairs of data\.mpo are trained on"):
        load_config(CONFIGS / "tiny.yaml", [*mine, "data.mpo=[{path: p.jsonl, split: test}]"])


def test_an_evaluation_is_another_one_where_questions_or_answers_would_be(tmp_path):
    """Names of evaluation folders, and of the SFT run, which none of these settings may touch."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (tmp_path / "pope.jsonl").write_text("{}")
    evaluation = {"benchmarks": [{"kind": "pope", "path": tmp_path / "pope.jsonl", "images": pictures}]}
    config = Config(evaluation=evaluation)
    place, run = layout.evaluation_dir(config, "sft", "ab"), layout.run_dir(config, "sft")

    def moved(**changed: object) -> bool:
        other = Config(**{"evaluation": evaluation, **changed})
        return layout.evaluation_dir(other, "sft", "ab") != place

    assert moved(model={"max_length_tokens": 77})
    assert not moved(evaluation=evaluation | {"max_bad_fraction": 0.5})
    assert layout.run_dir(Config(evaluation=evaluation | {"max_bad_fraction": 0.5}), "sft") == run
    (pictures / "a.png").write_bytes(b"x")
    assert moved(), "a picture of the benchmark is another one"


@pytest.mark.parametrize(("variant", "counts"), [("few_shot", True), ("shuffled", False)])
def test_what_a_stage_draws_is_part_of_an_evaluation_with_examples_only(variant, counts):
    evaluation, source = {"variants": [variant]}, {"path": "a.json", "split": "train"}
    plain = Config(evaluation=evaluation, data={"pretrain": [source], "sft": [source]})
    fewer = Config(evaluation=evaluation, data={"pretrain": [source], "sft": [source | {"max_rows": 9}]})
    assert (layout.evaluation_dir(plain, "sft", "ab") != layout.evaluation_dir(fewer, "sft", "ab")) is counts
