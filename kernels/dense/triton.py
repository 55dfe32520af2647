"""Dense entries on a GPU: launchers with the signatures of the reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfx.kernels.common import launch
from kvfx.kernels.common.accumulate import accumulate
from kvfx.kernels.common.attention import Rules
from kvfx.kernels.common.rows import kept_first
from kvfx.kernels.common.split_attention import attend_entries, refusal

# rows that one program copies
ROWS = 16


def constraint(verb: str, *operands: Tensor | None, **attributes: object) -> str | None:
    """Why Triton cannot serve these operands, or None."""
    del attributes
    k = operands[{"attend": 2, "attend_scored": 3}.get(verb, 0)]
    assert k is not None
    return refusal(k)


def store(
    k: Tensor, v: Tensor, keep: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor
) -> None:
    """Write the kept rows of k, v [B, K, S, D] behind the live entries; keep is [B, K, S] bool."""
    _check("store", k)
    order, count = kept_first(keep)
    _write(k, v, order, count, k_cache, v_cache, length)
    length.add_(count.to(length.dtype))


def append(
    k: Tensor, v: Tensor, keep: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor
) -> None:
    """Write one row k, v [B, K, 1, D] behind the live entries, if it is kept."""
    _check("append", k)
    k, v = launch.with_adjacent_channels(k), launch.with_adjacent_channels(v)
    batch, kv_heads = k.shape[:2]
    launch.run(
        append_kernel, (batch * kv_heads,), k, v, keep, k_cache, v_cache, length,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), keep.stride(0), keep.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2), kv_heads,
        WIDTH=k.shape[3], VALUE_WIDTH=v.shape[3], BLOCK_D=triton.next_power_of_2(k.shape[3]),
        BLOCK_V=triton.next_power_of_2(v.shape[3]), warps=1, stages=1,
    )  # fmt: skip


def attend(
    q: Tensor, position_ids: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor,
    position: Tensor | None = None, bias: Tensor | None = None, slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *, scale: float, softcap: float = 0.0, window: int | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one row q [B, H, 1, D] over the live entries: [B, H, 1, Dv]."""
    _check("attend", q, position_ids, k_cache)
    rules = Rules(slopes, sinks, softcap, window, chunk)
    return attend_entries(
        q, k_cache, v_cache, rules, scale=scale, length=length, q_position=position_ids,
        position=position, bias=bias,
    )[0]  # fmt: skip


def attend_scored(
    q: Tensor, position_ids: Tensor, score: Tensor, k_cache: Tensor, v_cache: Tensor,
    length: Tensor, position: Tensor | None = None, bias: Tensor | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, decay: float = 1.0, softcap: float = 0.0, window: int | None = None,
    chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """What `attend` returns; score [B, K, C] fp32 becomes `decay` times itself plus the weights
    that the entries get.
    """
    _check("attend_scored", q, position_ids, score, k_cache)
    rules = Rules(slopes, sinks, softcap, window, chunk)
    scores = torch.empty(*q.shape[:2], k_cache.shape[2], dtype=torch.float32, device=q.device)
    out, lse = attend_entries(
        q, k_cache, v_cache, rules, scale=scale, length=length, q_position=position_ids,
        position=position, bias=bias, scores=scores,
    )  # fmt: skip
    accumulate(scores, lse, length, score, decay)
    return out


def extend(
    q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, k_cache: Tensor, v_cache: Tensor,
    length: Tensor, position: Tensor | None = None, bias: Tensor | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, softcap: float = 0.0, window: int | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of S rows over the live entries and over themselves: [B, H, S, Dv]."""
    _check("extend", k)
    rules = Rules(slopes, sinks, softcap, window, chunk)
    return attend_entries(
        q, k_cache, v_cache, rules, scale=scale, length=length, q_position=position_ids,
        position=position, bias=bias, own=(k, v),
    )[0]  # fmt: skip


def _check(verb: str, *operands: Tensor) -> None:
    launch.require(f"{verb}_dense", constraint(verb, *operands))


def _write(
    k: Tensor, v: Tensor, order: Tensor, count: Tensor,
    k_cache: Tensor, v_cache: Tensor, length: Tensor,
) -> None:  # fmt: skip
    """Copy the first `count` [B, K] rows of `order` [B, K, S] to the end of the cache."""
    k, v = launch.with_adjacent_channels(k), launch.with_adjacent_channels(v)
    batch, kv_heads, rows, width = k.shape
    launch.run(
        store_kernel, (triton.cdiv(rows, ROWS), batch * kv_heads),
        k, v, order, count, k_cache, v_cache, length,
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2), kv_heads, rows, k_cache.shape[2],
        WIDTH=width, VALUE_WIDTH=v.shape[3], BLOCK_D=triton.next_power_of_2(width),
        BLOCK_V=triton.next_power_of_2(v.shape[3]), BLOCK_S=ROWS, warps=4, stages=1,
    )  # fmt: skip


@triton.jit
def append_kernel(
    k, v, keep, k_cache, v_cache, length,
    k_batch, k_head, v_batch, v_head, keep_batch, keep_head,
    k_cache_batch, k_cache_head, k_cache_entry, v_cache_batch, v_cache_head, v_cache_entry,
    kv_heads,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row of the batch and KV head."""
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    kept = tl.load(keep + batch * keep_batch + head * keep_head).to(tl.int32)
    slot = tl.load(length + tl.program_id(0))
    entry = slot.to(tl.int64)
    at_d, at_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    here = at_d < WIDTH * kept
    key = tl.load(k + batch * k_batch + head * k_head + at_d, mask=here, other=0.0)
    at = k_cache + batch * k_cache_batch + head * k_cache_head + entry * k_cache_entry
    tl.store(at + at_d, key, mask=here)
    here = at_v < VALUE_WIDTH * kept
    value = tl.load(v + batch * v_batch + head * v_head + at_v, mask=here, other=0.0)
    at = v_cache + batch * v_cache_batch + head * v_cache_head + entry * v_cache_entry
    tl.store(at + at_v, value, mask=here)
    tl.store(length + tl.program_id(0), slot + kept)


@triton.jit
def store_kernel(
    k, v, order, count, k_cache, v_cache, length,
    k_batch, k_head, k_row, v_batch, v_head, v_row,
    k_cache_batch, k_cache_head, k_cache_entry, v_cache_batch, v_cache_head, v_cache_entry,
    kv_heads, rows, capacity,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per block of kept rows, row of the batch and KV head."""
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    at_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    entry = tl.load(length + tl.program_id(1)).to(tl.int64) + at_s
    here = (at_s < tl.load(count + tl.program_id(1))) & (entry < capacity)
    at = order + tl.program_id(1).to(tl.int64) * rows + at_s
    row = tl.load(at, mask=here, other=0).to(tl.int64)
    at_d, at_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    mask = here[:, None] & (at_d < WIDTH)[None, :]
    at = k + batch * k_batch + head * k_head + row[:, None] * k_row + at_d[None, :]
    key = tl.load(at, mask=mask, other=0.0)
    at = k_cache + batch * k_cache_batch + head * k_cache_head + entry[:, None] * k_cache_entry
    tl.store(at + at_d[None, :], key, mask=mask)
    mask = here[:, None] & (at_v < VALUE_WIDTH)[None, :]
    at = v + batch * v_batch + head * v_head + row[:, None] * v_row + at_v[None, :]
    value = tl.load(at, mask=mask, other=0.0)
    at = v_cache + batch * v_cache_batch + head * v_cache_head + entry[:, None] * v_cache_entry
    tl.store(at + at_v[None, :], value, mask=mask)
