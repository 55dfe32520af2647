"""The rope room needs no kernel of its own: Inductor fuses the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._inductor import metrics

from kvfx import ops
from kvfx.kernels.rope.reference import rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# rotated pairs of 32 channels -> loops: where channels pass, one for each part of the output
@pytest.mark.slow
@pytest.mark.parametrize(("pairs", "loops"), [(16, 1), (12, 3)], ids=str)
@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_a_rotation_is_fused(style, pairs, loops):
    def turn(x: Tensor, shift: Tensor, frequencies: Tensor) -> Tensor:
        return ops.overload("rotate", "reference")(x, shift, frequencies, style=style)

    torch._dynamo.reset()
    metrics.reset()
    x, shift = torch.randn(2, 4, 64, 32), torch.randint(0, 1000, (2, 2, 64))
    operands = [y.to(DEVICE) for y in (x, shift, torch.rand(pairs))]
    out = torch.compile(turn, fullgraph=True)(*operands)
    assert metrics.generated_kernel_count <= loops
    torch.testing.assert_close(out, rotate(*operands, style), rtol=1e-4, atol=1e-4)
