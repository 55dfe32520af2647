"""KIVI entries on a GPU: launchers with the signatures of the reference."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kvfx.kernels.common import launch
from kvfx.kernels.common.accumulate import accumulate
from kvfx.kernels.common.attention import Rules
from kvfx.kernels.common.combine import LOG2E, combine
from kvfx.kernels.common.rows import kept_first, live_entries
from kvfx.kernels.common.split_attention import attend_own, output, refusal
from kvfx.kernels.kivi.layout import Entries, Planes, quantized_of, schedule
from kvfx.kernels.kivi.triton_split import attend_cache
from kvfx.kernels.kivi.triton_store import (
    append_kernel,
    flush_kernel,
    load_kernel,
    ring_kernel,
    tiles_kernel,
)

# rows that one program copies
ROWS = 16
LEAST_WIDTH, WIDEST = 32, 256
# operands that stand before the buffers
BEFORE = {
    "store": 3, "append": 3, "attend": 2, "attend_scored": 3, "extend": 4, "flush": 0, "load": 0,
}  # fmt: skip


def constraint(verb: str, *operands: Any, **attributes: object) -> str | None:
    """Why Triton cannot serve these operands, or None."""
    before = BEFORE[verb]
    has = Entries(*operands[before : before + len(Entries._fields)])
    reason = refusal(has.k_residual)
    if reason is not None:
        return reason
    if launch.machine(operands[0].device).arch.startswith("gfx90"):
        return "this GPU takes subnormal fp16 numbers for zeros in matrix products"
    group_size = attributes["group_size"]
    assert isinstance(group_size, int)
    for name, ring in (("keys", has.k_residual), ("values", has.v_residual)):
        width = ring.shape[3]
        if width % group_size or not LEAST_WIDTH <= width <= WIDEST:
            return (
                f"{name} have {width} channels: multiples of group_size {group_size} from "
                f"{LEAST_WIDTH} to {WIDEST} are served"
            )
    rows = {"store": operands[:2], "append": operands[:2], "extend": operands[1:3]}.get(verb, ())
    for x, ring in zip(rows, (has.k_residual, has.v_residual), strict=False):
        if x.shape[3] != ring.shape[3]:
            return f"rows have {x.shape[3]} channels, the cache has {ring.shape[3]}"
    return None


def store(
    k: Tensor, v: Tensor, keep: Tensor, *buffers: Tensor,
    k_bits: int, v_bits: int, group_size: int, residual: int, rule: str,
) -> None:  # fmt: skip
    """Write the kept rows of k, v [B, K, S, D] as if they were appended and flushed one by one."""
    _check("store", k, v, keep, *buffers, group_size=group_size)
    has, due = Entries(*buffers), schedule(group_size, residual, rule)
    order, count = kept_first(keep)
    total = has.length.long() + count
    batch, kv_heads, rows = keep.shape
    for keys, x, codes, scales, zeros, ring, coded, bits, size, block in (
        (True, k, *has[:3], has.k_residual, has.k_quantized, k_bits, due.k_ring, due.k_block),
        (False, v, *has[3:6], has.v_residual, has.v_quantized, v_bits, due.v_ring, due.v_block),
    ):
        target = quantized_of(total, size, block)
        # tokens that are exact or new, from the begin of a tile on
        most = triton.cdiv(size + rows + group_size - 1, group_size)
        shared = (x.stride(0), x.stride(1), x.stride(2), kv_heads, rows)
        launch.run(
            tiles_kernel, (min(most, codes.shape[2]), batch * kv_heads),
            x, order, codes, scales, zeros, ring, has.length, coded, target,
            *shared, codes.shape[2], size,
            KEYS=keys, **_tile(ring.shape[3], group_size, bits), warps=4, stages=1,
        )  # fmt: skip
        launch.run(
            ring_kernel, (triton.cdiv(rows, ROWS), batch * kv_heads),
            x, order, ring, has.length, target, total, *shared, size,
            WIDTH=ring.shape[3], BLOCK_S=ROWS, BLOCK_D=triton.next_power_of_2(ring.shape[3]),
            warps=4, stages=1,
        )  # fmt: skip
        coded.copy_(target)
    has.length.copy_(total)


def append(
    k: Tensor, v: Tensor, keep: Tensor, *buffers: Tensor,
    k_bits: int, v_bits: int, group_size: int, residual: int, rule: str,
) -> None:  # fmt: skip
    """Write one row k, v [B, K, 1, D] behind the live entries.

    In kivi mode, the value that thereby falls out of its ring becomes codes.
    """
    del k_bits
    _check("append", k, v, keep, *buffers, group_size=group_size)
    has, due = Entries(*buffers), schedule(group_size, residual, rule)
    batch, kv_heads, tiles = has.v_codes.shape[:3]
    tile = _tile(has.v_residual.shape[3], group_size, v_bits)
    value_width, width = tile.pop("WIDTH"), has.k_residual.shape[3]
    launch.run(
        append_kernel, (batch * kv_heads,),
        k, v, keep, has.k_residual, has.v_residual, *has[3:6], has.length, has.v_quantized,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), keep.stride(0), keep.stride(1),
        kv_heads, tiles, due.k_ring, due.v_ring,
        LEAVES=due.v_block == 1, WIDTH=width, VALUE_WIDTH=value_width, **tile,
        BLOCK_D=triton.next_power_of_2(width), BLOCK_V=triton.next_power_of_2(value_width),
        warps=4, stages=1,
    )  # fmt: skip


def flush(
    *buffers: Tensor, k_bits: int, v_bits: int, group_size: int, residual: int, rule: str
) -> None:
    """Quantize the oldest block of every full ring; other rows and heads stay as they are."""
    _check("flush", *buffers, group_size=group_size)
    has, due = Entries(*buffers), schedule(group_size, residual, rule)
    batch, kv_heads, tiles = has.k_codes.shape[:3]
    for keys, has_codes, ring, coded, bits, size, block in (
        (True, has[:3], has.k_residual, has.k_quantized, k_bits, due.k_ring, due.k_block),
        (False, has[3:6], has.v_residual, has.v_quantized, v_bits, due.v_ring, due.v_block),
    ):
        programs = triton.cdiv(block, group_size)
        launch.run(
            flush_kernel, (programs, batch * kv_heads),
            *has_codes, ring, has.length, coded, tiles, size,
            KEYS=keys, BLOCK=block, ALONE=programs == 1,
            **_tile(ring.shape[3], group_size, bits), warps=4, stages=1,
        )  # fmt: skip
        if programs > 1:
            coded.add_((has.length - coded == size).to(coded.dtype) * block)


def attend(
    q: Tensor, position_ids: Tensor,
    k_codes: Tensor, k_scales: Tensor, k_zeros: Tensor, v_codes: Tensor, v_scales: Tensor,
    v_zeros: Tensor, k_residual: Tensor, v_residual: Tensor, length: Tensor, k_quantized: Tensor,
    v_quantized: Tensor, position: Tensor | None = None, bias: Tensor | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, k_bits: int, v_bits: int, group_size: int, residual: int, rule: str,
    softcap: float = 0.0, window: int | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one row q [B, H, 1, D] over the live entries, never unpacked: [B, H, 1, Dv]."""
    del residual
    has = Entries(
        k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros, k_residual, v_residual, length,
        k_quantized, v_quantized,
    )  # fmt: skip
    _check("attend", q, position_ids, *has, group_size=group_size)
    rules = Rules(slopes, sinks, softcap, window, chunk)
    asked = position_ids if position is not None or rules.positioned else None
    partial, stats = attend_cache(
        q, asked, has, scale * LOG2E, k_bits, v_bits, group_size, rule, rules, more=0,
        position=position, bias=bias,
    )  # fmt: skip
    out = q.new_empty(*q.shape[:3], partial.shape[2])
    combine(partial, stats, out, sinks)
    return out


def attend_scored(
    q: Tensor, position_ids: Tensor, score: Tensor,
    k_codes: Tensor, k_scales: Tensor, k_zeros: Tensor, v_codes: Tensor, v_scales: Tensor,
    v_zeros: Tensor, k_residual: Tensor, v_residual: Tensor, length: Tensor, k_quantized: Tensor,
    v_quantized: Tensor, position: Tensor | None = None, bias: Tensor | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, k_bits: int, v_bits: int, group_size: int, residual: int, rule: str,
    decay: float = 1.0, softcap: float = 0.0, window: int | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """What `attend` returns; score [B, K, N] fp32 becomes `decay` times itself plus the weights
    that the entries get.
    """
    del residual
    has = Entries(
        k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros, k_residual, v_residual, length,
        k_quantized, v_quantized,
    )  # fmt: skip
    _check("attend_scored", q, position_ids, score, *has, group_size=group_size)
    rules = Rules(slopes, sinks, softcap, window, chunk)
    asked = position_ids if position is not None or rules.positioned else None
    scores = torch.empty(*q.shape[:2], score.shape[2], dtype=torch.float32, device=q.device)
    partial, stats = attend_cache(
        q, asked, has, scale * LOG2E, k_bits, v_bits, group_size, rule, rules, more=0,
        position=position, bias=bias, scores=scores,
    )  # fmt: skip
    out = q.new_empty(*q.shape[:3], partial.shape[2])
    lse = combine(partial, stats, out, sinks)
    accumulate(scores, lse, length, score, decay)
    return out


def extend(
    q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor,
    k_codes: Tensor, k_scales: Tensor, k_zeros: Tensor, v_codes: Tensor, v_scales: Tensor,
    v_zeros: Tensor, k_residual: Tensor, v_residual: Tensor, length: Tensor, k_quantized: Tensor,
    v_quantized: Tensor, position: Tensor | None = None, bias: Tensor | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, k_bits: int, v_bits: int, group_size: int, residual: int, rule: str,
    softcap: float = 0.0, window: int | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of S rows over the live entries and themselves, not stored yet: [B, H, S, Dv]."""
    del residual
    has = Entries(
        k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros, k_residual, v_residual, length,
        k_quantized, v_quantized,
    )  # fmt: skip
    _check("extend", q, k, v, position_ids, *has, group_size=group_size)
    rules = Rules(slopes, sinks, softcap, window, chunk)
    partial, stats = attend_cache(
        q, position_ids, has, scale * LOG2E, k_bits, v_bits, group_size, rule, rules, more=1,
        position=position, bias=bias,
    )  # fmt: skip
    attend_own(q, k, v, partial, stats, rules, scale=scale, q_position=position_ids)
    out = output(q, v)
    combine(partial, stats, out, sinks)
    return out


def load(
    *buffers: Tensor, k_bits: int, v_bits: int, group_size: int, residual: int, rule: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries by position: k [B, K, T, D], v [B, K, T, Dv], live [B, K, T].

    T is what tiles and the ring of keys may hold together; what is not live is zero.
    """
    _check("load", *buffers, group_size=group_size)
    has, due = Entries(*buffers), schedule(group_size, residual, rule)
    batch, kv_heads, tiles = has.k_codes.shape[:3]
    size = tiles * group_size + due.k_ring
    out = []
    for keys, has_codes, ring, coded, bits in (
        (True, has[:3], has.k_residual, has.k_quantized, k_bits),
        (False, has[3:6], has.v_residual, has.v_quantized, v_bits),
    ):
        width = ring.shape[3]
        out.append(ring.new_empty(batch, kv_heads, size, width))
        launch.run(
            load_kernel, (triton.cdiv(size, ROWS), batch * kv_heads),
            out[-1], *has_codes, ring, has.length, coded, tiles, ring.shape[2], size,
            KEYS=keys, WIDTH=width, GROUP=group_size, BITS=bits,
            PLANES=Planes(bits, width, group_size).planes, BLOCK_N=ROWS,
            BLOCK_D=triton.next_power_of_2(width), warps=4, stages=1,
        )  # fmt: skip
    return out[0], out[1], live_entries(out[0], has.length)


def _check(verb: str, *operands: Tensor, group_size: int) -> None:
    launch.require(f"{verb}_kivi", constraint(verb, *operands, group_size=group_size))


def _tile(width: int, group_size: int, bits: int) -> dict[str, int]:
    """The constants of a kernel that writes tiles."""
    planes = Planes(bits, width, group_size)
    return {
        "WIDTH": width, "GROUP": group_size, "BITS": bits, "PLANES": planes.planes,
        "BLOCK_R": triton.next_power_of_2(planes.rows),
        "BLOCK_W": triton.next_power_of_2(planes.words),
        "BLOCK_G": triton.next_power_of_2(group_size),
    }  # fmt: skip
