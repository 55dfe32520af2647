"""Linear layers of one row: a matrix-vector product that streams the weights once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] times weight [O, I] transposed, plus bias [O]; accumulated in fp32 or wider.

    A single row is spelled as products and a sum: Inductor turns that into a fused, vectorized,
    threaded loop at memory bandwidth, where ATen's GEMM for one row reaches about a third of it.
    """
    if x.numel() != x.shape[-1]:
        return F.linear(x, weight, bias)
    row = x.reshape(-1)
    out = (row.float() * weight.float()).sum(-1).to(x.dtype).reshape(*x.shape[:-1], -1)
    return out if bias is None else out + bias
