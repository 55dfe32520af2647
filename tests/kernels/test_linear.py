"""The linear room: a product that is as accurate as ATen's, for one row and for many."""

from __future__ import annotations

import pytest
import torch

from kvfx.kernels.linear.reference import linear
from kvfx.testing.numerics import assert_as_accurate_as


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1,), (3, 1), (2, 5)], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (63, 100), (128, 65)], ids=str)
def test_accuracy(dtype, bias, shape, inputs, outputs):
    x, weight = torch.randn(*shape, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    offset = torch.randn(outputs, dtype=dtype) if bias else None
    out = linear(x, weight, offset)
    assert (out.dtype, out.shape) == (dtype, (*shape, outputs))
    truth = torch.nn.functional.linear(
        x.double(), weight.double(), offset.double() if offset is not None else None
    )
    low_precision = torch.nn.functional.linear(x, weight, offset)
    assert_as_accurate_as(out, low_precision=low_precision, truth=truth)
