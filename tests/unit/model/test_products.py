"""The operators of attention by products: what torch asks of operators, and that tracing changes nothing.

Their values and gradients are compared with torch's attention in tests/unit/test_fast_layers.py.
"""

import pytest
import torch

from minivlm.model.products import causal_products
from minivlm.model.segments import segment_layouts
from tests.sample_lines import LENGTHS, line_of, states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_keep_the_rules_of_torch(dtype: torch.dtype) -> None:
    """Their shapes without values, and both as torch.compile traces them."""
    segment_ids = line_of(LENGTHS)
    layout, _ = segment_layouts(segment_ids, (4, 2), 64)
    assert layout is not None
    inputs = states(segment_ids.numel(), dtype)
    operators = torch.ops.minivlm
    torch.library.opcheck(operators.causal_products.default, (*inputs, *layout, 0.3))
    mixed, cells, weights = operators.causal_products(*inputs, *layout, 0.3)
    given = (torch.randn_like(mixed), cells, weights, layout.packed, layout.num_cells, 2, 0.3)
    torch.library.opcheck(operators.causal_products_backward.default, given)


def test_values_and_gradients_are_the_same_in_a_traced_graph() -> None:
    results = []
    for wrap in (lambda function: function, torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)):
        attention = wrap(causal_products)
        for lengths in (LENGTHS, (3, 70)):  # another number of groups, and of everything else
            segment_ids = line_of(lengths)
            layout, _ = segment_layouts(segment_ids, (4, 2), 96)
            leaves = [tensor.requires_grad_() for tensor in states(segment_ids.numel(), torch.bfloat16)]
            found = attention(*leaves, layout, scaling=0.3)
            results += [found, *torch.autograd.grad(found.square().sum(), leaves)]
    half = len(results) // 2
    for plain, traced in zip(results[:half], results[half:], strict=True):
        assert torch.equal(plain, traced)
