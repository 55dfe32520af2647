"""The second half of split attention: parts over disjoint entries become one softmax.

A part stores, per query row, its sum of values that is not normalized, its maximum score m (base 2)
and its sum of weights l: `partial` [rows, parts, Dv] fp32 and `stats` [rows, parts, 2] fp32, with
rows = (batch * heads + head) * S + row. A part that saw nothing stores m = -inf, l = 0 and zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfx.kernels.common import launch

# scores are kept in base 2: on the host, and inside kernels
LOG2E = 1.4426950408889634
IN_BASE_2 = tl.constexpr(LOG2E)


def combine(partial: Tensor, stats: Tensor, out: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Merge the parts into out [B, H, S, Dv] and return the log-sum-exp (base 2) [B, H, S].

    `sinks` [H] fp32 are logits that take weight and give nothing. Rows that saw nothing are zeros.
    """
    batch, heads, rows, width = out.shape
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=out.device)
    launch.run(
        combine_kernel, (batch * heads * rows,), partial, stats, out, lse, sinks,
        out.stride(0), out.stride(1), out.stride(2), heads, rows,
        PARTS=partial.shape[1], BLOCK_P=min(16, triton.next_power_of_2(partial.shape[1])),
        WIDTH=width, BLOCK_D=triton.next_power_of_2(width), warps=4, stages=1,
    )  # fmt: skip
    return lse


def workspace(q: Tensor, parts: int, width: int) -> tuple[Tensor, Tensor]:
    """Room for `parts` parts of the attention of q [B, H, S, D] over values of `width` channels."""
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    partial = torch.empty(rows, parts, width, dtype=torch.float32, device=q.device)
    return partial, torch.empty(rows, parts, 2, dtype=torch.float32, device=q.device)


@triton.jit
def combine_kernel(
    partial, stats, out, lse, sinks, out_batch, out_head, out_row, heads, rows,
    PARTS: tl.constexpr, BLOCK_P: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per query row."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program % rows, program // rows % heads
    batch = program // rows // heads
    channel = tl.arange(0, BLOCK_D)
    m = float("-inf")
    if sinks is not None:
        m = tl.load(sinks + head).to(tl.float32) * IN_BASE_2
    for start in tl.static_range(0, PARTS, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        at = stats + (program * PARTS + part) * 2
        m = tl.maximum(m, tl.max(tl.load(at, mask=part < PARTS, other=float("-inf")), 0))
    # -inf minus -inf is no number
    m = tl.where(m == float("-inf"), 0.0, m)
    total = 0.0
    if sinks is not None:
        total = tl.exp2(tl.load(sinks + head).to(tl.float32) * IN_BASE_2 - m)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in tl.static_range(0, PARTS, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        at = program * PARTS + part
        weight = tl.exp2(tl.load(stats + at * 2, mask=part < PARTS, other=float("-inf")) - m)
        total += tl.sum(weight * tl.load(stats + at * 2 + 1, mask=part < PARTS, other=0.0), 0)
        inside = (part < PARTS)[:, None] & (channel < WIDTH)[None, :]
        piece = tl.load(partial + at[:, None] * WIDTH + channel[None, :], mask=inside, other=0.0)
        acc += tl.sum(piece * weight[:, None], 0)
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    acc = acc / total
    at = out + batch * out_batch + head * out_head + row * out_row + channel
    tl.store(at, acc.to(out.dtype.element_ty), mask=channel < WIDTH)
    tl.store(lse + program, tl.where(seen, tl.log2(total) + m, float("-inf")))
