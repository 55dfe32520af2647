"""Sets that are runs of neighbouring rows: where each one starts, and sums over it."""

from __future__ import annotations

import torch
from torch import Tensor


def runs(target: Tensor) -> tuple[Tensor, Tensor]:
    """First and last row of the run that each row is in, rows of one target: [B, K, T] int64."""
    rows = target.shape[-1]
    index = torch.arange(rows, device=target.device).expand_as(target)
    starts = torch.ones_like(target, dtype=torch.bool)
    starts[..., 1:] = target[..., 1:] != target[..., :-1]
    first = torch.where(starts, index, 0).cummax(-1).values
    ends = starts.roll(-1, -1)
    ends[..., -1:] = True
    last = torch.where(ends, index, rows).flip(-1).cummin(-1).values.flip(-1)
    return first, last


def run_sum(x: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Every row's sum of x [B, K, T] over its run, fp32; a difference of sums, so in fp64."""
    total = x.double().cumsum(-1)
    before = torch.where(first > 0, total.gather(-1, (first - 1).clamp(min=0)), 0.0)
    return (total.gather(-1, last) - before).float()
