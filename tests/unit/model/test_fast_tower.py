"""The bfloat16 tower on a CPU: other kernels, the same features."""

import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.testing import assert_close
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionModel

from minivlm.model.fast_tower import LONGEST_EAGER, PackedLinear, PatchProduct, use_products
from minivlm.model.image_tokens import count_features
from minivlm.model.vision import VisionTower

has_packed = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()), reason="no such oneDNN"
)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_features_are_as_near_to_float32_as_the_stock_models(request, pictures, family):
    folder = request.getfixturevalue(f"{family}_folder")
    exact = VisionTower.load(folder, batch_size=4)
    fast = VisionTower.load(folder, precision="bfloat16", batch_size=4)
    pixel_values = exact.preprocess(pictures)
    expected = exact.encode_exact(pixel_values)
    kind = SiglipVisionModel if family == "siglip" else CLIPVisionModel
    stock = kind.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        states = stock(pixel_values.bfloat16(), output_hidden_states=True)
    error = (fast.encode_exact(pixel_values) - expected).abs().mean()
    stock_error = (states.hidden_states[-1].float() - expected).abs().mean()
    assert isinstance(fast.model.embeddings.patch_embedding, PatchProduct)
    assert 0 < error < 1.5 * stock_error
    assert fast.fingerprint != exact.fingerprint


@given(width=st.integers(1, 700), height=st.integers(1, 700), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pictures_are_prepared_as_the_stock_processor_does(clip_folder, width, height, seed):
    if max(width, height) > 20 * min(width, height):
        height = width  # longer ones are refused when they are opened
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    tower = _tower(clip_folder)
    stock = tower.image_processor(images=[Image.fromarray(pixels)], return_tensors="pt")["pixel_values"]
    assert torch.equal(tower.preprocess([Image.fromarray(pixels)]), stock)


@cache
def _tower(folder: str) -> VisionTower:
    return VisionTower.load(folder, batch_size=1)


@has_packed
@pytest.mark.parametrize(("rows", "size", "out"), [(16 * 50, 768, 3072), (16 * 50, 3072, 768), (17, 32, 64), (1, 8, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_weights_give_the_same_to_a_rounding(rows, size, out, bias):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(size, out, bias=bias).bfloat16().requires_grad_(False)
    states = torch.randn(1, rows, size, generator=generator).bfloat16()
    packed = PackedLinear(linear, rows)
    assert_close(packed(states), linear(states), rtol=2**-7, atol=2**-7)  # the same bits on AVX-512
    assert_close(packed(states[:, :1]), linear(states[:, :1]), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (39, 47)])
def test_a_product_over_patches_is_the_convolution(bias, height, width):
    convolution = nn.Conv2d(3, 5, kernel_size=8, stride=8, bias=bias)
    pixel_values = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(PatchProduct(convolution)(pixel_values), convolution(pixel_values), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("side", "attention"), [(128, "eager"), (144, "sdpa")])
def test_long_towers_do_not_write_their_scores_out(side, attention):
    config = CLIPVisionConfig(
        image_size=side, patch_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = CLIPVisionModel(config).bfloat16().requires_grad_(False)
    use_products(model, count_features(config), batch_size=2)
    assert (count_features(config) <= LONGEST_EAGER) == (attention == "eager")
    assert model.config._attn_implementation == attention
    assert model(torch.zeros(2, 3, side, side).bfloat16()).last_hidden_state.isfinite().all()


SCRIPT = """
import resource, sys, torch
from minivlm.data.encoder import _keep_freed_memory
if sys.argv[1] == "keep":
    _keep_freed_memory()
for turn in range(30):
    torch.zeros(2**23)
    if turn == 9:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_an_encoder_keeps_the_memory_of_its_tensors():
    """32 MB are 8,192 pages, 16 where huge ones are usual; glibc gives what is above its threshold back each time."""
    faults = {}
    for mode in ("keep", "give back"):
        command = [sys.executable, "-c", SCRIPT, mode]
        faults[mode] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults["keep"] < faults["give back"] / 10
