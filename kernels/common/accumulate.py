"""Scores of one row become weights, which add up over the rows of a conversation."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvfx.kernels.common import launch

ENTRIES = 512


def accumulate(
    scores: Tensor, lse: Tensor, length: Tensor, score: Tensor, decay: float = 1.0
) -> None:
    """Multiply score [B, K, T] fp32 by `decay` and add the weight of each live entry, summed over
    its query heads.

    scores [B, H, T] are base 2 and hold garbage beyond length [B, K]; lse [B, H, 1] is their
    log-sum-exp, base 2.
    """
    batch, kv_heads, entries = score.shape
    launch.run(
        accumulate_kernel, (triton.cdiv(entries, ENTRIES), batch * kv_heads),
        scores, lse, length, score, decay, entries,
        REPEAT=scores.shape[1] // kv_heads, BLOCK_T=ENTRIES, warps=4, stages=1,
    )  # fmt: skip


@triton.jit
def accumulate_kernel(
    scores, lse, length, score, decay, entries, REPEAT: tl.constexpr, BLOCK_T: tl.constexpr
):
    """One program per block of entries, row of the batch and KV head."""
    row = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = entry < tl.load(length + row)
    at = score + row * entries + entry
    total = tl.load(at, mask=live, other=0.0) * decay
    for head in range(REPEAT):
        query = row * REPEAT + head
        raw = tl.load(scores + query * entries + entry, mask=live, other=float("-inf"))
        base = tl.load(lse + query)
        # -inf minus -inf is no number
        total += tl.exp2(raw - tl.where(base == float("-inf"), 0.0, base))
    tl.store(at, total, mask=live)
