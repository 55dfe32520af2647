"""The choice of entries on a GPU: the score of the last one kept, found bit by bit, without a
sort.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfx.kernels.common import launch

# rows that a program reads at once, and loads in flight while it counts
BLOCK = 2048
UNROLL = 2
INTERPRETED_BLOCK = 64
WARPS = 8


def constraint(verb: str, *operands: Tensor, **attributes: object) -> str | None:
    """Why the kernel of `verb` ("select_top") cannot serve these operands, or None."""
    del verb, attributes
    score = operands[0]
    if score.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"scores are fp32, fp16 or bf16, not {score.dtype}"
    return launch.unavailable(score.device)


def select_top(
    score: Tensor, live: Tensor, count: Tensor, sinks: int, recent: int, share: float = 0.0
) -> Tensor:
    """Keep `count` [B, K] live rows: the first `sinks`, the last `recent` and that `share` of the
    count, then those of largest score [B, K, T]; equal scores prefer the smaller index, NaN is the
    smallest score.
    """
    launch.require("select_top", constraint("select_top", score))
    batch, kv_heads, rows = score.shape
    keep = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    keys = torch.empty(score.shape, dtype=torch.int32, device=score.device)
    interpreted = launch.machine(score.device).arch == "interpreter"
    block = INTERPRETED_BLOCK if interpreted else BLOCK
    launch.run(
        key_kernel, (batch * kv_heads,), score, live, count, keys, *score.stride(), *live.stride(),
        *count.stride(), kv_heads, rows, sinks, recent, share, BLOCK=block, warps=WARPS, stages=1,
    )  # fmt: skip
    # a launch of its own: what a program wrote is there for all its threads
    launch.run(
        select_kernel, (batch * kv_heads,), keys, count, keep, *count.stride(), kv_heads, rows,
        BLOCK=block, UNROLL=UNROLL, warps=WARPS, stages=1,
    )  # fmt: skip
    return keep


@triton.jit
def key_kernel(
    score, live, count, keys,
    score_batch, score_head, score_row, live_batch, live_head, live_row, count_batch, count_head,
    kv_heads, rows, sinks, recent, share,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row of the batch and KV head: an integer per row, in the order of choice."""
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // kv_heads, pair % kv_heads
    score += batch * score_batch + head * score_head
    live += batch * live_batch + head * live_head
    keys += pair * rows
    allowed = tl.load(count + batch * count_batch + head * count_head).to(tl.float32)
    recent += tl.floor(allowed * share).to(tl.int32)
    at = tl.arange(0, BLOCK)
    alive = tl.zeros([BLOCK], dtype=tl.int32)
    for start in tl.range(0, rows, BLOCK):
        row = tl.cast(start, tl.int64) + at
        alive += tl.load(live + row * live_row, mask=row < rows, other=0).to(tl.int32)
    newest = tl.sum(alive, 0) - recent
    rank = 0
    for start in tl.range(0, rows, BLOCK):
        row = tl.cast(start, tl.int64) + at
        here = tl.load(live + row * live_row, mask=row < rows, other=0).to(tl.int32)
        place = rank + tl.cumsum(here, 0)
        rank += tl.sum(here, 0)
        value = tl.load(score + row * score_row, mask=row < rows, other=0.0).to(tl.float32)
        key = _ordered(value)
        key = tl.where((place <= sinks) | (place > newest), 0x7FFFFFFF, key)
        tl.store(keys + row, tl.where(here != 0, key, -0x80000000), mask=row < rows)


@triton.jit
def select_kernel(
    keys, count, keep, count_batch, count_head, kv_heads, rows,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One program per row of the batch and KV head."""
    pair = tl.program_id(0).to(tl.int64)
    keep += pair * rows
    keys += pair * rows
    wanted = tl.load(count + pair // kv_heads * count_batch + pair % kv_heads * count_head)
    at = tl.arange(0, BLOCK)
    # the largest key that `wanted` keys reach, two bits at a time, from the smallest number on
    last = tl.full([], -0x80000000, dtype=tl.int64)
    above = tl.full([], 0, dtype=tl.int32)
    for bit in tl.range(0, 32, 2):
        step = tl.full([], 1, dtype=tl.int64) << (30 - bit)
        one, two, three = _reach(keys, at, rows, last, step, BLOCK, UNROLL)
        if three >= wanted:
            last += 3 * step
        elif two >= wanted:
            last += 2 * step
            above = three
        elif one >= wanted:
            last += step
            above = two
        else:
            above = one

    edge = last.to(tl.int32)
    ties = wanted - above
    rank = 0
    for start in tl.range(0, rows, BLOCK):
        row = start + at
        key = tl.load(keys + row, mask=row < rows, other=-0x80000000)
        equal = (key == edge).to(tl.int32)
        place = rank + tl.cumsum(equal, 0)
        rank += tl.sum(equal, 0)
        # rows that are not live have the smallest number as their key
        kept = (key > edge) | ((equal != 0) & (place <= ties) & (key != -0x80000000))
        tl.store(keep + row, kept, mask=row < rows)


@triton.jit
def _ordered(value):
    """Integers in the order of fp32 values, between those for rows that are not live and sinks."""
    value = tl.where(value == value, value, float("-inf"))
    # -0.0 becomes 0.0
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _reach(keys, at, rows, last, step, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """How many keys are at least `last` plus one, two, three steps."""
    first, second, third = last + step, last + 2 * step, last + 3 * step
    first, second, third = first.to(tl.int32), second.to(tl.int32), third.to(tl.int32)
    one = tl.zeros([BLOCK], dtype=tl.int32)
    two = tl.zeros([BLOCK], dtype=tl.int32)
    three = tl.zeros([BLOCK], dtype=tl.int32)
    for start in tl.range(0, rows, BLOCK, loop_unroll_factor=UNROLL):
        row = start + at
        # what is no row reaches nothing: every threshold is above the smallest number
        key = tl.load(keys + row, mask=row < rows, other=-0x80000000)
        one += (key >= first).to(tl.int32)
        two += (key >= second).to(tl.int32)
        three += (key >= third).to(tl.int32)
    return tl.sum(one, 0), tl.sum(two, 0), tl.sum(three, 0)
