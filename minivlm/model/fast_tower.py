"""A frozen bfloat16 tower on a CPU by what oneDNN is fast at; features differ from the stock model's by rounding.

Figures: docs/RESULTS.md. Called by `minivlm.model.vision`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionModel, SiglipVisionModel

LONGEST_EAGER = 300
"""Features up to which attention writes its scores out, where torch's fused one takes twice as long. A batch of 16 with
577 features would need 0.7 GB for them."""


def use_products(model: CLIPVisionModel | SiglipVisionModel, num_features: int, batch_size: int) -> None:
    """Change the model in place; it can no longer be saved.

    Args:
        num_features, batch_size: of every forward.
    """
    model.embeddings.patch_embedding = PatchProduct(model.embeddings.patch_embedding)
    if num_features <= LONGEST_EAGER:
        model.set_attn_implementation("eager")
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        for layer in model.encoder.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(parent, name, PackedLinear(child, num_features * batch_size))


class PatchProduct(nn.Module):
    """A convolution whose patches do not overlap, as one matrix product over all patches: half its time."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, D, H // patch, W // patch]; what is left of H and W is not read."""
        side = self.weight.shape[-1]
        patches = pixel_values.unfold(2, side, side).unfold(3, side, side)
        rows = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)
        return functional.linear(rows, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class PackedLinear(nn.Module):
    """A linear layer whose weights lie as oneDNN's kernel reads them, and not copied to that order in every call."""

    def __init__(self, linear: nn.Linear, num_rows: int) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), num_rows)
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """[..., D_in] -> [..., D_out]."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(states, self.packed, self.bias, "none", [], "")
        return output
