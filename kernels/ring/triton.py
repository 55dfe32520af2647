"""Rings of a sliding window on a GPU: launchers with the signatures of the reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfx.kernels.common import launch
from kvfx.kernels.common.attention import Rules
from kvfx.kernels.common.split_attention import attend_entries, refusal


def constraint(verb: str, *operands: Tensor | None, **attributes: object) -> str | None:
    """Why Triton cannot serve these operands, or None."""
    del attributes
    k = operands[2 if verb == "attend" else 0]
    assert k is not None
    return refusal(k)


def store(
    k: Tensor, v: Tensor, position_ids: Tensor, k_cache: Tensor, v_cache: Tensor,
    position: Tensor, length: Tensor, window: int,
) -> None:  # fmt: skip
    """Write the newest rows of k, v [B, K, S, D] that are not padding; position_ids is [B, S]."""
    del window
    _check("store", k)
    real = position_ids >= 0
    rank = real.long().cumsum(1) - 1
    newest = rank >= real.sum(1, keepdim=True) - k_cache.shape[2]
    # rows that nothing will see go nowhere
    slot = torch.where(real & newest, (length.long() + rank) % k_cache.shape[2], -1)
    _write(k, v, position_ids, slot, k_cache, v_cache, position)
    length.add_(real.sum(1, keepdim=True).to(length.dtype))


def append(
    k: Tensor, v: Tensor, position_ids: Tensor, k_cache: Tensor, v_cache: Tensor,
    position: Tensor, length: Tensor, window: int,
) -> None:  # fmt: skip
    """Write one row k, v [B, K, 1, D] over the oldest entry; padding (position -1) is written but
    never seen.
    """
    del window
    _check("append", k)
    _write(k, v, position_ids, length % k_cache.shape[2], k_cache, v_cache, position)
    length.add_((position_ids >= 0).to(length.dtype))


def attend(
    q: Tensor, position_ids: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor,
    length: Tensor, slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, window: int, softcap: float = 0.0, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one row q [B, H, 1, D] over the entries inside its window, under the model's
    `Rules`: [B, H, 1, Dv].
    """
    del length
    _check("attend", q, position_ids, k_cache)
    rules = Rules(slopes, sinks, softcap, window, chunk)
    return attend_entries(
        q, k_cache, v_cache, rules, scale=scale, length=None, q_position=position_ids,
        position=position[:, None],
    )[0]  # fmt: skip


def extend(
    q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, k_cache: Tensor, v_cache: Tensor,
    position: Tensor, length: Tensor, slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, window: int, softcap: float = 0.0, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of S rows over the ring and over themselves, before they are stored: [B, H, S,
    Dv].
    """
    del length
    _check("extend", k)
    rules = Rules(slopes, sinks, softcap, window, chunk)
    return attend_entries(
        q, k_cache, v_cache, rules, scale=scale, length=None, q_position=position_ids,
        position=position[:, None], own=(k, v),
    )[0]  # fmt: skip


def _check(verb: str, *operands: Tensor) -> None:
    launch.require(f"{verb}_ring", constraint(verb, *operands))


def _write(
    k: Tensor, v: Tensor, position_ids: Tensor, slot: Tensor,
    k_cache: Tensor, v_cache: Tensor, position: Tensor,
) -> None:  # fmt: skip
    """Write row s of k, v [B, K, S, D] and its position to slot [B, S] (negative: nowhere)."""
    k, v = launch.with_adjacent_channels(k), launch.with_adjacent_channels(v)
    batch, kv_heads, rows, width = k.shape
    launch.run(
        write_kernel, (rows, batch * kv_heads),
        k, v, position_ids, slot, k_cache, v_cache, position,
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
        position_ids.stride(0), slot.stride(0), kv_heads, k_cache.shape[2],
        WIDTH=width, VALUE_WIDTH=v.shape[3], BLOCK_D=triton.next_power_of_2(width),
        BLOCK_V=triton.next_power_of_2(v.shape[3]), warps=1, stages=1,
    )  # fmt: skip


@triton.jit
def write_kernel(
    k, v, position_ids, slot, k_cache, v_cache, position,
    k_batch, k_head, k_row, v_batch, v_head, v_row, position_batch, slot_batch, kv_heads, capacity,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per new row, row of the batch and KV head."""
    row = tl.program_id(0).to(tl.int64)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    entry = tl.load(slot + batch * slot_batch + row).to(tl.int64)
    if entry >= 0:
        at_d, at_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
        line = tl.program_id(1).to(tl.int64) * capacity + entry
        at = k + batch * k_batch + head * k_head + row * k_row + at_d
        key = tl.load(at, mask=at_d < WIDTH, other=0.0)
        tl.store(k_cache + line * WIDTH + at_d, key, mask=at_d < WIDTH)
        at = v + batch * v_batch + head * v_head + row * v_row + at_v
        value = tl.load(at, mask=at_v < VALUE_WIDTH, other=0.0)
        tl.store(v_cache + line * VALUE_WIDTH + at_v, value, mask=at_v < VALUE_WIDTH)
        if head == 0:
            asked = tl.load(position_ids + batch * position_batch + row)
            tl.store(position + batch * capacity + entry, asked.to(tl.int32))
