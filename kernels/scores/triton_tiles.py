"""Device code of the rows' log-sum-exp: a stationary block of queries against tiles of keys.

A block of queries interleaves the heads of a group, so that they share each key that is read: query
m is row `first + m // REPEAT` of grouped head `m % REPEAT`. The log-sum-exp [pairs, REPEAT, rows -
first] of padding is +inf: its weights are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvfx.kernels.common.dot import dot
from kvfx.kernels.scores.triton_rules import ruled


@triton.jit
def lse_kernel(
    q, k, live, span, lse, position, slopes, scale, softcap,
    q_batch, q_head, q_row, k_batch, k_head, k_row, live_batch, live_head, live_row,
    kv_heads, rows, first, ahead, blocks, parts,
    REPEAT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, RULED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per block of queries, part of its keys, row of the batch and KV head."""
    # the blocks with most keys start first
    part, block = tl.program_id(0) % parts, blocks - 1 - tl.program_id(0) // parts
    pair = tl.program_id(1).to(tl.int64)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    k += batch * k_batch + kv_head * k_head
    live += batch * live_batch + kv_head * live_head
    at_m, at_d = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row, head = first + at_m // REPEAT, kv_head * REPEAT + at_m % REPEAT
    query_at = q + batch * q_batch + head[:, None] * q_head
    query_at += (row - ahead).to(tl.int64)[:, None] * q_row + at_d[None, :]
    mask = (row < rows)[:, None] & (at_d < WIDTH)[None, :]
    query = tl.load(query_at, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]
    asked, slope = None, None
    if slopes is not None:
        position += pair * rows
        asked = tl.load(position + row, mask=row < rows, other=0)[:, None]
        slope = tl.load(slopes + head)[:, None]
    start, clean = tl.load(span + pair * 2), tl.load(span + pair * 2 + 1)
    last = tl.minimum(rows - 1, first + (block * BLOCK_M + BLOCK_M - 1) // REPEAT)
    low, high = start // BLOCK_N, last // BLOCK_N + 1
    each = tl.cdiv(tl.maximum(high - low, 0), parts)
    low += part * each
    high = tl.minimum(low + each, high)
    # tiles below `open` may hold padding, tiles from `shut` on keys that come after a row
    open = tl.minimum(tl.maximum(tl.cdiv(clean, BLOCK_N), low), high)
    shut = tl.minimum(tl.maximum((first + block * BLOCK_M // REPEAT + 1) // BLOCK_N, open), high)
    best = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    best, total = _sum_tiles(
        query, k, live, row, best, total, position, asked, slope, scale, softcap, k_row, live_row,
        rows, open, 0, shut - open, 0, False, RULED, WIDTH, BLOCK_D, BLOCK_N, STAGES,
    )  # fmt: skip
    best, total = _sum_tiles(
        query, k, live, row, best, total, position, asked, slope, scale, softcap, k_row, live_row,
        rows, low, open - low, open - low + high - shut, shut - open, True, RULED, WIDTH,
        BLOCK_D, BLOCK_N, 1,
    )  # fmt: skip
    alive = tl.load(live + row.to(tl.int64) * live_row, mask=row < rows, other=0) != 0
    unseen = tl.where(parts == 1, float("inf"), float("-inf"))
    seen = alive & (total > 0.0)
    value = tl.where(seen, best + tl.log2(tl.where(seen, total, 1.0)), unseen)
    value_at = lse + ((pair * parts + part) * REPEAT + at_m % REPEAT) * (rows - first)
    tl.store(value_at + at_m // REPEAT, value, mask=row < rows)


@triton.jit
def _sum_tiles(
    query, k, live, row, best, total, position, asked, slope, scale, softcap, k_row, live_row,
    rows, low, gap, count, jump,
    MASKED: tl.constexpr, RULED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Take `count` tiles of keys from `low` on into maximum and sum; after `gap` tiles, `jump`."""
    at_n, at_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    # what moves from step to step is one number
    key_at = k + at_n.to(tl.int64)[:, None] * k_row + at_d[None, :]
    empty = tl.zeros([query.shape[0], BLOCK_N], dtype=tl.float32)
    unit = 1.0 if RULED else scale
    for step in tl.range(0, count, num_stages=STAGES):
        tile = low + step
        if MASKED:
            tile += tl.where(step >= gap, jump, 0)
        entry = tile * BLOCK_N + at_n
        mask = (at_d < WIDTH)[None, :]
        if MASKED:
            mask = mask & (entry < rows)[:, None]
        offset = tl.cast(tile * BLOCK_N, tl.int64) * k_row
        key = tl.load(key_at + offset, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        score = dot(query, tl.trans(key), empty)  # [BLOCK_M, BLOCK_N]
        if RULED:
            held = None
            if slope is not None:
                held = tl.load(position + entry, mask=entry < rows, other=0)[None, :]
            score = ruled(score, scale, softcap, slope, asked, held)
        if MASKED:
            alive = tl.load(live + entry.to(tl.int64) * live_row, mask=entry < rows, other=0) != 0
            seen = alive[None, :] & (entry[None, :] <= row[:, None])
            score = tl.where(seen, score, float("-inf"))
        now = tl.maximum(best, tl.max(score, 1) * unit)
        # -inf minus -inf is no number
        base = tl.where(now == float("-inf"), 0.0, now) if MASKED else now
        weight = tl.exp2(score * unit - base[:, None])
        total = total * tl.exp2(best - base) + tl.sum(weight, 1)
        best = now
    return best, total


@triton.jit
def merge_kernel(partial, lse, queries, parts, BLOCK_M: tl.constexpr):
    """One program per block of queries: the log-sum-exp of all parts."""
    pair = tl.program_id(1).to(tl.int64)
    at_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = at_m < queries
    best = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for part in tl.range(0, parts):
        at = partial + (pair * parts + part) * queries + at_m
        value = tl.load(at, mask=mask, other=float("-inf"))
        now = tl.maximum(best, value)
        # -inf minus -inf is no number
        base = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp2(best - base) + tl.exp2(value - base)
        best = now
    seen = total > 0.0
    value = tl.where(seen, best + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
    tl.store(lse + pair * queries + at_m, value, mask=mask)
