"""Heads that keep different numbers of entries, on a GPU: launchers with the signatures of the
reference.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kvfx.kernels.common import launch
from kvfx.kernels.common.attention import Rules
from kvfx.kernels.common.split_attention import attend_entries, refusal
from kvfx.kernels.flat.layout import layout
from kvfx.kernels.flat.triton_rows import accumulate_kernel, append_kernel, store_kernel

# slots that one program fills, and those whose weights it adds up
ROWS, SLOTS = 16, 512


def constraint(verb: str, *operands: Tensor | None, **attributes: object) -> str | None:
    """Why Triton cannot serve these operands, or None."""
    del attributes
    # a row of keys, new or stored
    k = operands[{"attend": 2, "attend_scored": 3}.get(verb, 0)]
    assert k is not None
    return refusal(k)


def store(
    k: Tensor, v: Tensor, keep: Tensor, k_flat: Tensor, v_flat: Tensor, start: Tensor,
    length: Tensor,
) -> None:  # fmt: skip
    """Lay out anew, with the kept rows of k, v [B, K, S, D] behind the live entries; keep is [B, K,
    S] bool.
    """
    _check("store", k)
    new = layout(keep, start, length, k_flat.shape[1])
    _write(k, v, new.source, k_flat, v_flat)
    start.copy_(new.start)
    length.copy_(new.length)


def append(
    k: Tensor, v: Tensor, keep: Tensor, k_flat: Tensor, v_flat: Tensor, start: Tensor,
    length: Tensor,
) -> None:  # fmt: skip
    """Write one row k, v [B, K, 1, D] behind the live entries of each head that keeps it and has
    room.
    """
    _check("append", k)
    k, v = launch.with_adjacent_channels(k), launch.with_adjacent_channels(v)
    batch, kv_heads = k.shape[:2]
    launch.run(
        append_kernel, (batch * kv_heads,), k, v, keep, k_flat, v_flat, start, length,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), keep.stride(0), keep.stride(1),
        kv_heads, k_flat.shape[1],
        WIDTH=k.shape[3], VALUE_WIDTH=v.shape[3], BLOCK_D=triton.next_power_of_2(k.shape[3]),
        BLOCK_V=triton.next_power_of_2(v.shape[3]), warps=1, stages=1,
    )  # fmt: skip


def attend(
    q: Tensor, position_ids: Tensor, k_flat: Tensor, v_flat: Tensor, start: Tensor, length: Tensor,
    position: Tensor | None = None, bias: Tensor | None = None, slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *, scale: float, softcap: float = 0.0, window: int | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one row q [B, H, 1, D] over the live entries of its KV head: [B, H, 1, Dv]."""
    _check("attend", q, position_ids, k_flat)
    kv_heads = start.shape[1]
    return attend_entries(
        q, _shared(k_flat, kv_heads), _shared(v_flat, kv_heads),
        Rules(slopes, sinks, softcap, window, chunk), scale=scale, length=length, start=start,
        q_position=position_ids, position=_of_one(position), bias=_of_one(bias),
    )[0]  # fmt: skip


def attend_scored(
    q: Tensor, position_ids: Tensor, score: Tensor, k_flat: Tensor, v_flat: Tensor, start: Tensor,
    length: Tensor, position: Tensor | None = None, bias: Tensor | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, decay: float = 1.0, softcap: float = 0.0, window: int | None = None,
    chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """What `attend` returns; score [B, N] fp32 becomes `decay` times itself plus the weights that
    the entries get.
    """
    _check("attend_scored", q, position_ids, score, k_flat)
    (batch, kv_heads), slots = start.shape, k_flat.shape[1]
    repeat = q.shape[1] // kv_heads
    scores = torch.empty(batch, repeat, slots, dtype=torch.float32, device=q.device)
    out, lse = attend_entries(
        q, _shared(k_flat, kv_heads), _shared(v_flat, kv_heads),
        Rules(slopes, sinks, softcap, window, chunk), scale=scale, length=length, start=start,
        q_position=position_ids, position=_of_one(position), bias=_of_one(bias), scores=scores,
    )  # fmt: skip
    launch.run(
        accumulate_kernel, (triton.cdiv(slots, SLOTS), batch),
        scores, lse, start, length, score, decay, slots,
        KV_HEADS=kv_heads, REPEAT=repeat, BLOCK_T=SLOTS, warps=4, stages=1,
    )  # fmt: skip
    return out


def extend(
    q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, k_flat: Tensor, v_flat: Tensor,
    start: Tensor, length: Tensor, position: Tensor | None = None, bias: Tensor | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, softcap: float = 0.0, window: int | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of S rows over the live entries and over themselves: [B, H, S, Dv]."""
    _check("extend", k)
    kv_heads = start.shape[1]
    return attend_entries(
        q, _shared(k_flat, kv_heads), _shared(v_flat, kv_heads),
        Rules(slopes, sinks, softcap, window, chunk), scale=scale, length=length, start=start,
        q_position=position_ids, position=_of_one(position), bias=_of_one(bias), own=(k, v),
    )[0]  # fmt: skip


def _check(verb: str, *operands: Tensor) -> None:
    launch.require(f"{verb}_flat", constraint(verb, *operands))


def _shared(x: Tensor, kv_heads: int) -> Tensor:
    """The slots x [B, N, D] as every KV head's own: [B, K, N, D], with stride 0."""
    return x[:, None].expand(-1, kv_heads, -1, -1)


def _of_one(x: Tensor | None) -> Tensor | None:
    """Numbers per slot [B, N] as those of one head [B, 1, N]."""
    return None if x is None else x[:, None]


def _write(k: Tensor, v: Tensor, source: Tensor, k_flat: Tensor, v_flat: Tensor) -> None:
    """Fill each slot from its source [B, N]: an old slot, or a row of k, v [B, K, S, D]."""
    k, v = launch.with_adjacent_channels(k), launch.with_adjacent_channels(v)
    batch, _, rows, width = k.shape
    slots = k_flat.shape[1]
    # old entries move both ways: what is overwritten is read from a copy
    launch.run(
        store_kernel, (triton.cdiv(slots, ROWS), batch),
        k, v, source, k_flat.clone(), v_flat.clone(), k_flat, v_flat,
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), rows, slots,
        WIDTH=width, VALUE_WIDTH=v.shape[3], BLOCK_D=triton.next_power_of_2(width),
        BLOCK_V=triton.next_power_of_2(v.shape[3]), BLOCK_S=ROWS, warps=4, stages=1,
    )  # fmt: skip
