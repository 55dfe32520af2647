"""Device code of the column sums: a stationary block of keys against tiles of queries.

The log-sum-exp [pairs, REPEAT, rows - first] of padding is +inf: its weights are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvfx.kernels.common.dot import dot
from kvfx.kernels.scores.triton_rules import ruled


@triton.jit
def column_kernel(
    q, k, live, span, lse, received, position, slopes, scale, softcap, factor,
    q_batch, q_head, q_row, k_batch, k_head, k_row, live_batch, live_head, live_row,
    kv_heads, rows, first, ahead,
    REPEAT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, RULED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per block of keys, row of the batch and KV head: all queries from its rows on."""
    block = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    q += batch * q_batch + kv_head * REPEAT * q_head - tl.cast(ahead, tl.int64) * q_row
    lse += pair * REPEAT * (rows - first)
    entry, at_d = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    key_at = k + batch * k_batch + kv_head * k_head
    key_at += entry.to(tl.int64)[:, None] * k_row + at_d[None, :]
    mask = (entry < rows)[:, None] & (at_d < WIDTH)[None, :]
    key = tl.load(key_at, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
    held = None
    if slopes is not None:
        position += pair * rows
        slopes += kv_head * REPEAT
        held = tl.load(position + entry, mask=entry < rows, other=0)[:, None]
    start, clean = tl.load(span + pair * 2), tl.load(span + pair * 2 + 1)
    # the first row that sees one of these keys, and the first one from where on all rows see all
    sees = tl.maximum(tl.maximum(block * BLOCK_N, start), first) - first
    full = tl.maximum(tl.maximum(block * BLOCK_N + BLOCK_N - 1, clean), first) - first
    # a block of padding gets nothing
    high = tl.where(block * BLOCK_N + BLOCK_N <= start, 0, tl.cdiv(rows - first, BLOCK_M))
    low = tl.minimum(sees // BLOCK_M, high)
    shut = tl.minimum(tl.maximum(tl.cdiv(full, BLOCK_M), low), high)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    total = _add_tiles(
        key, q, lse, entry, total, position, slopes, held, scale, softcap, q_head, q_row,
        rows, first, shut, high, False, RULED, REPEAT, WIDTH, BLOCK_D, BLOCK_M, STAGES,
    )  # fmt: skip
    total = _add_tiles(
        key, q, lse, entry, total, position, slopes, held, scale, softcap, q_head, q_row,
        rows, first, low, shut, True, RULED, REPEAT, WIDTH, BLOCK_D, BLOCK_M, 1,
    )  # fmt: skip
    live_at = live + batch * live_batch + kv_head * live_head + entry.to(tl.int64) * live_row
    alive = tl.load(live_at, mask=entry < rows, other=0) != 0
    total = tl.where(alive, total * factor, 0.0)
    tl.store(received + pair * rows + entry, total, mask=entry < rows)


@triton.jit
def _add_tiles(
    key, q, lse, entry, total, position, slopes, held, scale, softcap, q_head, q_row,
    rows, first, low, high,
    MASKED: tl.constexpr, RULED: tl.constexpr, REPEAT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the weights of the rows in tiles `low` to `high`, head by head, to the keys' total."""
    at_m, at_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    # what moves from step to step is one number
    query_at = q + at_m.to(tl.int64)[:, None] * q_row + at_d[None, :]
    empty = tl.zeros([key.shape[0], BLOCK_M], dtype=tl.float32)
    for step in tl.range(low * REPEAT, high * REPEAT, num_stages=STAGES):
        head, begin = step % REPEAT, step // REPEAT * BLOCK_M
        inside = at_m < rows - first - begin
        offset = tl.cast(head, tl.int64) * q_head + tl.cast(first + begin, tl.int64) * q_row
        mask = inside[:, None] & (at_d < WIDTH)[None, :]
        query = tl.load(query_at + offset, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]
        norm_at = lse + head * (rows - first) + begin + at_m
        norm = tl.load(norm_at, mask=inside, other=float("inf"))
        score = dot(key, tl.trans(query), empty)  # [BLOCK_N, BLOCK_M]
        if RULED:
            asked, slope = None, None
            if slopes is not None:
                slope = tl.load(slopes + head)
                asked = tl.load(position + first + begin + at_m, mask=inside, other=0)[None, :]
            score = ruled(score, scale, softcap, slope, asked, held) - norm[None, :]
        else:
            score = score * scale - norm[None, :]
        if MASKED:
            row = first + begin + at_m
            seen = (entry[:, None] <= row[None, :]) & (norm < float("inf"))[None, :]
            score = tl.where(seen, score, float("-inf"))
        total += tl.sum(tl.exp2(score), 1)
    return total
