"""Attention over exact rows of keys and values, split into parts that `combine` merges.

Grouped query heads and query rows share one block of M rows, so each key is read once per block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfx.kernels.common import launch
from kvfx.kernels.common.attention import Rules
from kvfx.kernels.common.combine import IN_BASE_2, LOG2E, combine, workspace
from kvfx.kernels.common.dot import dot
from kvfx.kernels.common.triton_softcap import capped

# query rows and heads that share what is read
LEAST_ROWS, MOST_ROWS = 16, 64
# bytes of a key
WIDEST = 2048


class Config(NamedTuple):
    """Entries per step, warps, and steps that are loaded ahead."""

    tile: int
    warps: int
    stages: int


# (arch family, bytes of one key) -> for one row and for many; chosen offline: no spills, and on
# NVIDIA 16-byte asynchronous copies
CONFIGS = {
    ("sm", 64): (Config(128, 4, 3), Config(64, 4, 3)),
    ("sm", 128): (Config(128, 4, 3), Config(64, 4, 2)),
    ("sm", 256): (Config(64, 4, 3), Config(64, 8, 2)),
    ("sm", 512): (Config(32, 4, 3), Config(32, 8, 2)),
    ("sm", 1024): (Config(16, 4, 2), Config(16, 8, 2)),
    ("sm", 2048): (Config(16, 8, 1), Config(16, 8, 1)),
    ("gfx", 64): (Config(64, 4, 2), Config(64, 4, 2)),
    ("gfx", 128): (Config(64, 4, 2), Config(64, 4, 2)),
    ("gfx", 256): (Config(32, 4, 2), Config(32, 4, 2)),
    ("gfx", 512): (Config(32, 4, 2), Config(32, 8, 1)),
    ("gfx", 1024): (Config(16, 4, 1), Config(16, 8, 1)),
    ("gfx", 2048): (Config(16, 8, 1), Config(16, 8, 1)),
}
INTERPRETED = Config(16, 1, 1)


def config(arch: str, width: int, itemsize: int, block: int) -> Config:
    """The launch configuration for keys of `width` channels and blocks of `block` query rows."""
    if arch == "interpreter":
        return INTERPRETED
    family = "sm" if arch.startswith("sm") else "gfx"
    size = triton.next_power_of_2(max(width * itemsize, 64))
    chosen = CONFIGS[family, size][block > LEAST_ROWS]
    # products of fp32 take no tensor cores, and many registers
    return chosen._replace(tile=16, warps=8) if itemsize == 4 else chosen


def block_of(rows: int, repeat: int) -> int:
    """Query rows and heads in one block."""
    return max(LEAST_ROWS, min(MOST_ROWS, triton.next_power_of_2(rows * repeat)))


def refusal(k: Tensor) -> str | None:
    """Why keys k [..., D] cannot be attended to by Triton, or None."""
    reason = launch.unavailable(k.device)
    if reason is not None:
        return reason
    if k.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"keys are {k.dtype}: fp32, fp16 and bf16 are served"
    if k.shape[-1] * k.element_size() > WIDEST:
        return f"keys have {k.shape[-1]} channels of {k.dtype}: at most {WIDEST} bytes are served"
    return None


def cache_parts(q: Tensor, k: Tensor) -> int:
    """Into how many parts attention of q [B, H, S, D] over k [B, K, T, D] is best split."""
    machine = launch.machine(q.device)
    rows, repeat = q.shape[2], q.shape[1] // k.shape[1]
    block = block_of(rows, repeat)
    tile = config(machine.arch, k.shape[3], k.element_size(), block).tile
    programs = k.shape[0] * k.shape[1] * triton.cdiv(rows * repeat, block)
    return launch.parts(programs, triton.cdiv(k.shape[2], tile), machine.processors, resident=2)


def output(q: Tensor, v: Tensor) -> Tensor:
    """Room for attention output [B, H, S, Dv], laid out in memory as [B, S, H, Dv]."""
    batch, heads, rows = q.shape[:3]
    return q.new_empty(batch, rows, heads, v.shape[3]).transpose(1, 2)


def attend_entries(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, rules: Rules, *, scale: float,
    length: Tensor | None, q_position: Tensor, position: Tensor | None = None,
    bias: Tensor | None = None, scores: Tensor | None = None, start: Tensor | None = None,
    own: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention [B, H, S, Dv] of q [B, H, S, D] over a cache and, where given, over the rows' own
    k, v [B, K, S, D], which are not stored yet; and its log-sum-exp (base 2) [B, H, S].

    The other operands are those of `attend_parts`.
    """
    parts = cache_parts(q, k_cache)
    partial, stats = workspace(q, parts + (own is not None), v_cache.shape[3])
    attend_parts(
        q, k_cache, v_cache, partial, stats, rules, first=0, parts=parts, scale=scale,
        length=length, q_position=q_position, position=position, bias=bias, scores=scores,
        start=start,
    )  # fmt: skip
    if own is None:
        out = q.new_empty(*q.shape[:3], v_cache.shape[3])
    else:
        attend_own(q, *own, partial, stats, rules, scale=scale, q_position=q_position)
        out = output(q, v_cache)
    return out, combine(partial, stats, out, rules.sinks)


def attend_own(
    q: Tensor, k: Tensor, v: Tensor, partial: Tensor, stats: Tensor, rules: Rules, *,
    scale: float, q_position: Tensor,
) -> None:  # fmt: skip
    """Write the last part: that of rows over themselves, by their positions."""
    attend_parts(
        q, k, v, partial, stats, rules, first=stats.shape[1] - 1, parts=1, scale=scale,
        length=None, q_position=q_position, position=q_position[:, None],
    )  # fmt: skip


def attend_parts(
    q: Tensor, k: Tensor, v: Tensor, partial: Tensor, stats: Tensor, rules: Rules, *,
    first: int, parts: int, scale: float, length: Tensor | None, q_position: Tensor,
    position: Tensor | None = None, bias: Tensor | None = None, scores: Tensor | None = None,
    start: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the parts `first` to `first + parts` of the attention of q [B, H, S, D] over k, v.

    The entries k [B, K, T, D], v [B, K, T, Dv] count below length [B, K] (None: all of them).
    Where `position` [B, 1 or K, T] is given or a rule asks for positions, a row at q_position
    [B, S] sees entries at positions `0 <= p <= q_position` inside window and chunk; without
    `position`, an entry is at the position of its index. Rows at a negative q_position see nothing.
    `bias` [B, K, T] is added to scores. scores [B, H, T] fp32 get the scores (base 2) of the only
    row. Where `start` [B, K] is given, heads share their T entries (their stride is 0): those of a
    head lie from there on, here, in position and in bias, and scores are [B, H / K, T].
    """
    q, k, v = (launch.with_adjacent_channels(x) for x in (q, k, v))
    batch, heads, rows, width = q.shape
    kv_heads, entries = k.shape[1], k.shape[2]
    repeat = heads // kv_heads
    block = block_of(rows, repeat)
    blocks = triton.cdiv(rows * repeat, block)
    machine = launch.machine(q.device)
    tile, warps, stages = config(machine.arch, width, k.element_size(), block)
    positioned = position is not None or rules.positioned
    launch.run(
        attend_kernel, (blocks * parts, batch * kv_heads),
        q, k, v, partial, stats, length, start, q_position, position, bias, rules.slopes, scores,
        scale * LOG2E, rules.softcap or None, rules.window, rules.chunk,
        q.stride(0), q.stride(1), q.stride(2),
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
        q_position.stride(0), *_strides(position), *_strides(bias),
        kv_heads, rows, entries, first, parts, stats.shape[1],
        REPEAT=repeat, WIDTH=width, VALUE_WIDTH=v.shape[3], POSITIONED=positioned,
        BLOCK_M=block, BLOCK_N=tile, STAGES=stages,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
        BLOCK_V=max(16, triton.next_power_of_2(v.shape[3])),
        warps=warps, stages=stages,
    )  # fmt: skip


def _strides(x: Tensor | None) -> tuple[int, int]:
    """Strides of batch and head of [B, 1 or K, T]; a shared head has stride 0."""
    if x is None:
        return 0, 0
    assert x.stride(2) == 1, "entries lie next to each other"
    return x.stride(0), x.stride(1) if x.shape[1] > 1 else 0


@triton.jit
def attend_kernel(
    q, k, v, partial, stats, length, start, q_position, position, bias, slopes, scores,
    scale, softcap, window, chunk,
    q_batch, q_head, q_row, k_batch, k_head, k_entry, v_batch, v_head, v_entry,
    asked_batch, position_batch, position_head, bias_batch, bias_head,
    kv_heads, rows, entries, first, parts, all_parts,
    REPEAT: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    POSITIONED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per block of query rows, part, row of the batch and KV head."""
    part, block = tl.program_id(0) % parts, tl.program_id(0) // parts
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    at_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head = (at_m // REPEAT).to(tl.int64), kv_head * REPEAT + at_m % REPEAT
    inside = row < rows
    at_d, at_v, at_n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)

    q_at = q + batch * q_batch + head[:, None] * q_head + row[:, None] * q_row + at_d[None, :]
    mask = inside[:, None] & (at_d < WIDTH)[None, :]
    query = tl.load(q_at, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]
    asked = tl.load(q_position + batch * asked_batch + row, mask=inside, other=-1).to(tl.int32)
    reads = asked >= 0
    slope = tl.zeros([BLOCK_M], dtype=tl.float32)
    if slopes is not None:
        slope = tl.load(slopes + head, mask=inside, other=0.0).to(tl.float32)

    live = entries
    if length is not None:
        live = tl.load(length + batch * kv_heads + kv_head)
    tiles = tl.cdiv(live, BLOCK_N)
    each = tl.cdiv(tiles, parts)
    low = part * each
    high = tl.minimum(low + each, tiles)
    k_at = k + batch * k_batch + kv_head * k_head
    v_at = v + batch * v_batch + kv_head * v_head
    if start is not None:
        begin = tl.load(start + batch * kv_heads + kv_head).to(tl.int64)
        k_at += begin * k_entry
        v_at += begin * v_entry
        if position is not None:
            position += begin
        if bias is not None:
            bias += begin
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    for tile in tl.range(low, high, num_stages=STAGES):
        entry = (tile * BLOCK_N + at_n).to(tl.int64)
        there = entry < live
        whole = there[:, None] & (at_d < WIDTH)[None, :]
        key = tl.load(k_at + entry[:, None] * k_entry + at_d[None, :], mask=whole, other=0.0)
        whole = there[:, None] & (at_v < VALUE_WIDTH)[None, :]
        value = tl.load(v_at + entry[:, None] * v_entry + at_v[None, :], mask=whole, other=0.0)
        score = dot(query, tl.trans(key), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
        if softcap is not None:
            score = capped(score, softcap)
        seen = reads[:, None] & there[None, :]
        if POSITIONED:
            held = tile * BLOCK_N + at_n
            if position is not None:
                held_at = position + batch * position_batch + kv_head * position_head + entry
                held = tl.load(held_at, mask=there, other=-1).to(tl.int32)
                # zero times garbage may be NaN
                value = tl.where((held >= 0)[:, None], value, 0.0).to(value.dtype)
            distance = asked[:, None] - held[None, :]
            seen = seen & (held >= 0)[None, :] & (distance >= 0)
            if window is not None:
                seen = seen & (distance < window)
            if chunk is not None:
                seen = seen & ((asked // chunk)[:, None] == (held // chunk)[None, :])
            if slopes is not None:
                score -= slope[:, None] * IN_BASE_2 * distance.to(tl.float32)
        if bias is not None:
            bias_at = bias + batch * bias_batch + kv_head * bias_head + entry
            score += (tl.load(bias_at, mask=there, other=0.0) * IN_BASE_2)[None, :]
        score = tl.where(seen, score, float("-inf"))
        if scores is not None:
            line, slot = batch * kv_heads * REPEAT + head, entry
            if start is not None:
                line, slot = batch * REPEAT + at_m % REPEAT, begin + entry
            at = scores + line[:, None] * entries + slot[None, :]
            tl.store(at, score, mask=inside[:, None] & there[None, :])
        best = tl.maximum(m, tl.max(score, 1))
        # -inf minus -inf is no number
        base = tl.where(best == float("-inf"), 0.0, best)
        weight = tl.exp2(score - base[:, None])
        decay = tl.exp2(m - base)
        total = total * decay + tl.sum(weight, 1)
        acc = acc * decay[:, None]
        acc = dot(weight.to(value.dtype), value, acc)
        m = best

    out = (batch * kv_heads * REPEAT + head) * rows + row
    at = out * all_parts + first + part
    tl.store(stats + at * 2, m, mask=inside)
    tl.store(stats + at * 2 + 1, total, mask=inside)
    mask = inside[:, None] & (at_v < VALUE_WIDTH)[None, :]
    tl.store(partial + at[:, None] * VALUE_WIDTH + at_v[None, :], acc, mask=mask)
