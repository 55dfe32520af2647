"""Kernels that move rows between slots, and those that add up what slots got."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def append_kernel(
    k, v, keep, k_flat, v_flat, start, length,
    k_batch, k_head, v_batch, v_head, keep_batch, keep_head, kv_heads, slots,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row of the batch and KV head."""
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    here = tl.program_id(0)
    live = tl.load(length + here)
    slot = tl.load(start + here) + live
    end = tl.load(start + here + 1, mask=head + 1 < kv_heads, other=slots)
    kept = tl.load(keep + batch * keep_batch + head * keep_head).to(tl.int32)
    # a head without room leaves its neighbour alone
    kept = tl.where(slot < end, kept, 0)
    line = batch * slots + slot
    at_d, at_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    inside = at_d < WIDTH * kept
    key = tl.load(k + batch * k_batch + head * k_head + at_d, mask=inside, other=0.0)
    tl.store(k_flat + line * WIDTH + at_d, key, mask=inside)
    inside = at_v < VALUE_WIDTH * kept
    value = tl.load(v + batch * v_batch + head * v_head + at_v, mask=inside, other=0.0)
    tl.store(v_flat + line * VALUE_WIDTH + at_v, value, mask=inside)
    tl.store(length + here, live + kept)


@triton.jit
def store_kernel(
    k, v, source, k_old, v_old, k_flat, v_flat,
    k_batch, k_head, k_row, v_batch, v_head, v_row, rows, slots,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per block of slots and row of the batch."""
    batch = tl.program_id(1).to(tl.int64)
    slot = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    origin = tl.load(source + batch * slots + slot, mask=slot < slots, other=-1)
    old, new = (origin >= 0) & (origin < slots), origin >= slots
    head, row = (origin - slots) // rows, (origin - slots) % rows
    at_d, at_v = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_V)[None, :]
    before, now = (batch * slots + origin)[:, None], (batch * slots + slot)[:, None]

    inside = at_d < WIDTH
    key = tl.load(k_old + before * WIDTH + at_d, mask=old[:, None] & inside, other=0.0)
    at = k + batch * k_batch + (head * k_head + row * k_row)[:, None] + at_d
    fresh = tl.load(at, mask=new[:, None] & inside, other=0.0)
    key = tl.where(new[:, None], fresh, key)  # [BLOCK_S, BLOCK_D]
    tl.store(k_flat + now * WIDTH + at_d, key, mask=(old | new)[:, None] & inside)

    inside = at_v < VALUE_WIDTH
    value = tl.load(v_old + before * VALUE_WIDTH + at_v, mask=old[:, None] & inside, other=0.0)
    at = v + batch * v_batch + (head * v_head + row * v_row)[:, None] + at_v
    fresh = tl.load(at, mask=new[:, None] & inside, other=0.0)
    value = tl.where(new[:, None], fresh, value)  # [BLOCK_S, BLOCK_V]
    tl.store(v_flat + now * VALUE_WIDTH + at_v, value, mask=(old | new)[:, None] & inside)


@triton.jit
def accumulate_kernel(
    scores, lse, start, length, score, decay, slots,
    KV_HEADS: tl.constexpr, REPEAT: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program per block of slots and row of the batch: scores [B, M, N] are base 2, as is their
    log-sum-exp lse [B, H, 1].
    """
    batch = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.zeros([BLOCK_T], dtype=tl.int64)
    for other in range(1, KV_HEADS):
        head = tl.where(slot >= tl.load(start + batch * KV_HEADS + other), other, head)
    owner = batch * KV_HEADS + head
    live = slot < slots
    end = tl.load(start + owner, mask=live, other=0) + tl.load(length + owner, mask=live, other=0)
    live = live & (slot < end)
    at = score + batch * slots + slot
    total = tl.load(at, mask=live, other=0.0) * decay
    for query in range(REPEAT):
        line = (batch * REPEAT + query) * slots + slot
        raw = tl.load(scores + line, mask=live, other=float("-inf"))
        base = tl.load(lse + owner * REPEAT + query, mask=live, other=0.0)
        # -inf minus -inf is no number
        total += tl.exp2(raw - tl.where(base == float("-inf"), 0.0, base))
    tl.store(at, total, mask=live)
