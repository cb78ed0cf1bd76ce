"""The dry run prints sizes and placement, also where the data is not in its place yet."""

from pathlib import Path

from minivlm.config import load_config
from minivlm.workflow.dry_run import describe

CONFIGS = Path(__file__).parents[2] / "configs"


def test_gpu_settings_print_their_placement_without_the_data():
    text = describe(load_config(CONFIGS / "gpu.yaml"))
    assert "Ray Train workers, GPU, nccl, ZeRO-2, bfloat16" in text
    assert "not counted: No data file" in text


def test_demo_prints_its_parameters_and_rows(tmp_path):
    text = describe(load_config(CONFIGS / "tiny.yaml", [f"storage_path={tmp_path}"]))
    assert "10 image tokens" in text
    assert "sft              36,325 rows" in text
    assert list(tmp_path.iterdir()) == []
