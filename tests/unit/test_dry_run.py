"""The dry run prints sizes and placement, also where the data is not in its place yet."""

from pathlib import Path

import pytest
from transformers import SiglipVisionConfig

from minivlm.config import ConfigError, load_config
from minivlm.workflow.dry_run import describe

CONFIGS = Path(__file__).parents[2] / "configs"


def test_gpu_settings_print_their_placement_without_the_data():
    text = describe(load_config(CONFIGS / "gpu.yaml"))
    assert "Ray Train workers, GPU, nccl, ZeRO-2, bfloat16" in text
    assert "not counted: No data file" in text


def test_what_each_stage_learns_is_counted(tmp_path):
    overrides = [
        f"storage_path={tmp_path}",
        "train.pretrain.trainable=[projector]",
        "train.sft.trainable=[projector,language_model.edges]",
        "train.mpo.lora={rank: 2, targets: [q_proj]}",
        "train.mpo.muon_learning_rate=0",
        "train.gradient_checkpointing=true",
        "train.sample_every_steps=50",
    ]
    text = describe(load_config(CONFIGS / "tiny.yaml", overrides))
    projector, layer = 192 * 128 + 128 + 128 * 128 + 128, 4 * 128 * 128 + 3 * 128 * 512 + 2 * 128 + 2 * 32
    assert f"pretrain learns  {projector:,}: projector\n" in text
    assert f"sft learns       {projector + 2 * layer:,}: projector, language_model.edges (1 at each end)" in text
    assert f"mpo learns       {projector + 3 * 2 * 256:,}: projector, language_model by adapters of rank 2" in text
    assert "activations computed again, offload to the host: none" in text
    assert "samples          8 validation questions every 50 steps" in text


def test_demo_prints_its_parameters_and_rows(tmp_path):
    text = describe(load_config(CONFIGS / "tiny.yaml", [f"storage_path={tmp_path}"]))
    assert "trained here, 10 features per picture, frozen" in text
    assert "mlp2x_gelu, 10 image tokens per picture, 41,216 parameters" in text
    assert "for plain transformers" not in text
    assert "sft              40,825 rows" in text
    assert list(tmp_path.iterdir()) == []


def test_fewer_tokens_and_an_export_of_our_own_are_announced():
    text = describe(load_config(CONFIGS / "tiny.yaml", ["model.projector=pixel_shuffle"]))
    assert "pixel_shuffle, 4 image tokens per picture" in text
    assert "not for plain transformers" in text


def test_the_size_of_a_tower_comes_from_its_own_settings(tmp_path):
    SiglipVisionConfig(image_size=384, patch_size=14, hidden_size=1152).save_pretrained(tmp_path)
    text = describe(
        load_config(
            CONFIGS / "tiny.yaml", [f"clip.path={tmp_path}", "model.projector=linear", "model.max_length_tokens=1024"]
        )
    )
    assert "729 features per picture, frozen\n" in text
    assert f"729 image tokens per picture, {1152 * 128:,} parameters" in text


def test_a_tower_that_is_not_here_is_taken_as_described():
    text = describe(load_config(CONFIGS / "gpu.yaml", ["clip.path=nobody/no-such-tower"]))
    assert "nobody/no-such-tower, 50 features per picture, frozen (as clip.image_size_px" in text


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        (["model.projector=resampler", "model.resampler_queries=600"], "fewer model.resampler_queries"),
        (["model.max_length_tokens=10"], "model.projector=resampler"),
    ],
)
def test_pictures_that_leave_no_room_for_text_are_refused(overrides, advice):
    with pytest.raises(ConfigError, match=rf"type model\.max_length_tokens=\d+, or {advice}"):
        describe(load_config(CONFIGS / "tiny.yaml", overrides))


def test_the_preferences_say_whom_they_ask_and_how(tmp_path):
    text = describe(load_config(CONFIGS / "tiny.yaml", [f"storage_path={tmp_path}"]))
    assert "questions        as they are, 8 answers each" in text
    assert "answers          by the model after SFT; MPO starts from it" in text
    overrides = [
        "preferences.policy=/none",
        "preferences.prompt_style=boxed",
        "preferences.dropout_ntp_tasks=[caption]",
    ]
    other = describe(load_config(CONFIGS / "tiny.yaml", [f"storage_path={tmp_path}", *overrides]))
    assert "questions        asking for `boxed`, 8 answers each" in other
    assert "open questions   caption: 50% of each answer, continued without the picture" in other
    assert "refused          no folder /none" in other


def test_what_is_evaluated_is_listed_and_checked(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    overrides = [f"evaluation.exports.base={tmp_path / 'base'}", "evaluation.variants=[jpeg,few_shot]"]
    text = describe(load_config(CONFIGS / "tiny.yaml", [*overrides, "evaluation.num_shots=3"]))
    assert f"base: {tmp_path / 'base'}, content " in text
    assert "asked            as it is, jpeg, few_shot (3 examples), in batches of 256\n" in text
    assert "compared with    sft\n" in text
    with pytest.raises(ConfigError, match=r"evaluation\.baseline=bass is not among"):
        describe(load_config(CONFIGS / "tiny.yaml", [*overrides, "evaluation.baseline=bass"]))
    with pytest.raises(ConfigError, match="two models are called `sft`"):
        describe(load_config(CONFIGS / "tiny.yaml", [f"evaluation.exports.sft={tmp_path / 'base'}"]))
    with pytest.raises(ConfigError, match=r"evaluation\.exports\.base: .* holds no export"):
        describe(load_config(CONFIGS / "tiny.yaml", [f"evaluation.exports.base={tmp_path}"]))
