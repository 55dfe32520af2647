"""Attention that entries receive, without a matrix of weights: log-sum-exp first, then columns."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kvfx.kernels.common import launch
from kvfx.kernels.common.attention import Rules
from kvfx.kernels.common.combine import LOG2E
from kvfx.kernels.common.rows import places
from kvfx.kernels.scores.configs import config
from kvfx.kernels.scores.triton_columns import column_kernel
from kvfx.kernels.scores.triton_tiles import lse_kernel, merge_kernel

WIDEST = 512


def constraint(
    verb: str, q: Tensor, k: Tensor, *operands: Tensor | None, scale: float = 1.0, window: int = 1,
    softcap: float = 0.0,
) -> str | None:  # fmt: skip
    """Why the kernels of `verb` ("window", "columns") cannot serve, or None."""
    del verb, operands, softcap
    reason = launch.unavailable(q.device)
    if reason is not None:
        return reason
    if q.dtype != k.dtype or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"q and k are fp32, fp16 or bf16, both alike, not {q.dtype} and {k.dtype}"
    if q.shape[3] > WIDEST:
        return f"head_dim {q.shape[3]} is more than {WIDEST}"
    if q.stride(3) != 1 or k.stride(3) != 1:
        return "the channels of q and k must lie next to each other"
    if scale <= 0.0:
        return f"the scale must be positive, not {scale}"
    return None if window > 0 else f"the window must be positive, not {window}"


def window(
    q: Tensor, k: Tensor, live: Tensor, position: Tensor | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, window: int, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """The attention that the last `window` rows give to each row: [B, K, T] fp32, for q [B, H, S,
    D], k [B, K, T, D]; summed over rows, averaged over the query heads of a KV head.
    """
    launch.require("score_window", constraint("window", q, k, live, scale=scale, window=window))
    first = max(k.shape[2] - q.shape[2], k.shape[2] - window)
    rules, factor = Rules(slopes, sinks, softcap), k.shape[1] / q.shape[1]
    return _received(q, k, live, position, rules, scale, first, factor)


def columns(
    q: Tensor, k: Tensor, live: Tensor, position: Tensor | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """The attention that all rows of q give to each row: [B, K, T] fp32, for q [B, H, S, D], k [B,
    K, T, D]; summed over rows and over the query heads of a KV head.
    """
    launch.require("score_columns", constraint("columns", q, k, live, scale=scale))
    first, rules = k.shape[2] - q.shape[2], Rules(slopes, sinks, softcap)
    return _received(q, k, live, position, rules, scale, first, 1.0)


def _received(
    q: Tensor, k: Tensor, live: Tensor, position: Tensor | None, rules: Rules, scale: float,
    first: int, factor: float,
) -> Tensor:  # fmt: skip
    """Weights summed over the rows from `first` on and over grouped query heads, times `factor`."""
    batch, heads, asked, width = q.shape
    kv_heads, rows = k.shape[1], k.shape[2]
    # row r of the keys asks with row r - ahead of the queries
    ahead = rows - asked
    repeat, pairs = heads // kv_heads, batch * kv_heads
    received = torch.empty(batch, kv_heads, rows, dtype=torch.float32, device=q.device)
    if received.numel() == 0:
        return received
    machine = launch.machine(q.device)
    held, read, warps, stages = config(machine.arch, width, q.element_size())
    queries = (rows - first) * repeat
    blocks = triton.cdiv(queries, held)
    parts = launch.parts(blocks * pairs, triton.cdiv(rows, read), machine.processors, resident=2)
    span, slopes = _span(live), rules.slopes
    place = None
    if slopes is not None:
        # what is not live is at no position
        place = places(live, position).masked_fill(~live, 0).int().contiguous()
    lse = torch.empty(pairs, parts, queries, dtype=torch.float32, device=q.device)
    shape = {
        "REPEAT": repeat, "WIDTH": width, "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "RULED": slopes is not None or rules.softcap != 0.0,
    }  # fmt: skip
    change = (place, slopes, scale * LOG2E, rules.softcap or None)
    strides = (*q.stride()[:3], *k.stride()[:3], *live.stride())
    launch.run(
        lse_kernel, (blocks * parts, pairs),
        q, k, live, span, lse, *change, *strides, kv_heads, rows, first, ahead, blocks, parts,
        **shape, BLOCK_M=held, BLOCK_N=read, STAGES=stages, warps=warps, stages=stages,
    )  # fmt: skip
    if parts > 1:
        merged = torch.empty(pairs, 1, queries, dtype=torch.float32, device=q.device)
        launch.run(
            merge_kernel, (triton.cdiv(queries, 128), pairs), lse, merged, queries, parts,
            BLOCK_M=128, warps=4, stages=1,
        )  # fmt: skip
        lse = merged
    if rules.sinks is not None:
        # they take weight; that of padding stays infinite
        sinks = rules.sinks.float().reshape(kv_heads, repeat, 1) * LOG2E
        lse = torch.logaddexp2(lse.view(batch, kv_heads, repeat, -1), sinks)
    # a step takes rows of one head
    read = min(read, max(16, triton.next_power_of_2(rows - first)))
    launch.run(
        column_kernel, (triton.cdiv(rows, held), pairs),
        q, k, live, span, lse, received, *change, factor, *strides, kv_heads, rows, first, ahead,
        **shape, BLOCK_N=held, BLOCK_M=read, STAGES=stages, warps=warps, stages=stages,
    )  # fmt: skip
    return received


def _span(live: Tensor) -> Tensor:
    """Where the live rows [B, K, T] start, and from where on all are live: [B, K, 2] int32."""
    rows = live.shape[2]
    index = torch.arange(rows, dtype=torch.int32, device=live.device)
    start = torch.where(live, index, rows).amin(2)
    clean = torch.where(live, 0, index + 1).amax(2)
    return torch.stack((start, clean), 2)
