"""Device code of the merge room: tiles of whole rows, [BLOCK_T, BLOCK_D]."""

from __future__ import annotations

import triton
import triton.language as tl

# rows of a run that tiles read side by side; what is longer is read by all of the tile at once
SHORT = tl.constexpr(16)


@triton.jit
def similarity_kernel(
    k, cosine, k_batch, k_head, k_row, kv_heads, rows,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program per tile of rows, row of the batch and KV head: cosines of each row and the next
    one.
    """
    pair = tl.program_id(1).to(tl.int64)
    k += pair // kv_heads * k_batch + pair % kv_heads * k_head
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    at_d = tl.arange(0, BLOCK_D)
    mask = (row + 1 < rows)[:, None] & (at_d < WIDTH)[None, :]
    at = k + row[:, None] * k_row + at_d[None, :]
    this = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
    following = tl.load(at + k_row, mask=mask, other=0.0).to(tl.float32)
    norms = tl.sqrt(tl.sum(this * this, 1)) * tl.sqrt(tl.sum(following * following, 1))
    # the smallest normal number: rows that are 0 have no direction
    product = tl.sum(this * following, 1) / tl.where(norms > 1.17549435e-38, norms, 1.17549435e-38)
    # written so that NaN stays
    product = tl.where(product > 1.0, 1.0, tl.where(product < -1.0, -1.0, product))
    tl.store(cosine + pair * rows + row, product, mask=row < rows)


@triton.jit
def distance_kernel(
    k, target, distance, k_batch, k_head, k_row, kv_heads, rows,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program per tile of rows, row of the batch and KV head: how far keys are from their
    target's.
    """
    pair = tl.program_id(1).to(tl.int64)
    k += pair // kv_heads * k_batch + pair % kv_heads * k_head
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    at_d = tl.arange(0, BLOCK_D)
    to = tl.load(target + pair * rows + row, mask=row < rows, other=-1)
    mask = (to >= 0)[:, None] & (at_d < WIDTH)[None, :]
    this = tl.load(k + row[:, None] * k_row + at_d[None, :], mask=mask, other=0.0)
    led = tl.load(k + to[:, None] * k_row + at_d[None, :], mask=mask, other=0.0)
    change = this.to(tl.float32) - led.to(tl.float32)  # [BLOCK_T, BLOCK_D]
    tl.store(distance + pair * rows + row, tl.sqrt(tl.sum(change * change, 1)), mask=row < rows)


@triton.jit
def mean_kernel(
    x, out, weight, target, first, last, count, factor,
    x_batch, x_head, x_row, out_batch, out_head, out_row, kv_heads, rows,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program per tile of rows, row of the batch and KV head: rows that lead a run become its
    weighted mean, of rows divided by `count` and then times their `factor`, where there are such;
    the others stay.
    """
    pair = tl.program_id(1).to(tl.int64)
    x += pair // kv_heads * x_batch + pair % kv_heads * x_head
    out += pair // kv_heads * out_batch + pair % kv_heads * out_head
    begin = tl.program_id(0).to(tl.int64) * BLOCK_T
    row, at_d = begin + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    inside, wide = row < rows, (at_d < WIDTH)[None, :]
    weight += pair * rows
    target += pair * rows
    first += pair * rows
    last += pair * rows
    start = tl.load(first + row, mask=inside, other=0)
    leads = inside & (tl.load(target + row, mask=inside, other=-1) == row)
    size = tl.where(leads, tl.load(last + row, mask=inside, other=0) - start + 1, 0)
    own = tl.load(x + row[:, None] * x_row + at_d[None, :], mask=inside[:, None] & wide, other=0.0)
    centre = own.to(tl.float32)
    if count is not None:
        count += pair * rows
        centre /= tl.load(count + row, mask=inside, other=1.0)[:, None]
    # what the others weigh, and how far they pull: rows that nobody joins stay bit for bit
    others = tl.zeros([BLOCK_T], dtype=tl.float32)
    pull = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    longest = tl.max(size, 0)
    for step in tl.range(0, tl.minimum(longest, SHORT)):
        at = start + step
        here, value = _pulls(
            x, weight, count, centre, at, (step < size) & (at != row), x_row, WIDTH, BLOCK_D
        )  # fmt: skip
        others += here
        pull += value
    if longest > SHORT:
        for index in tl.range(0, BLOCK_T):
            chosen = tl.arange(0, BLOCK_T) == index
            if tl.max(tl.where(chosen, size, 0), 0) > SHORT:
                leader = begin + index
                low, high = tl.load(first + leader) + SHORT, tl.load(last + leader) + 1
                middle = tl.sum(tl.where(chosen[:, None], centre, 0.0), 0)
                here = tl.zeros([BLOCK_T], dtype=tl.float32)
                value = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
                for begun in tl.range(low, high, BLOCK_T):
                    at = begun + tl.arange(0, BLOCK_T)
                    more, further = _pulls(
                        x, weight, count, middle[None, :], at, (at < high) & (at != leader), x_row,
                        WIDTH, BLOCK_D,
                    )  # fmt: skip
                    here += more
                    value += further
                others += tl.where(chosen, tl.sum(here, 0), 0.0)
                pull += tl.where(chosen[:, None], tl.sum(value, 0)[None, :], 0.0)
    moved = others > 0.0
    mine = tl.load(weight + row, mask=inside, other=0.0)
    total = others + tl.where(mine > 0.0, mine, 0.0)
    mean = centre + pull / tl.where(moved, total, 1.0)[:, None]
    if factor is not None:
        # tokens count even where they weigh nothing
        moved = size > 1
        mean *= tl.load(factor + pair * rows + row, mask=inside, other=1.0)[:, None]
    mean = tl.where(moved[:, None], mean.to(out.dtype.element_ty), own)
    tl.store(out + row[:, None] * out_row + at_d[None, :], mean, mask=inside[:, None] & wide)


@triton.jit
def _pulls(x, weight, count, centre, at, joins, x_row, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """What rows weigh and their weighted distances from `centre`: 0 where they do not join."""
    at_d = tl.arange(0, BLOCK_D)
    here = tl.load(weight + at, mask=joins, other=0.0)
    joins = here > 0.0
    mask = joins[:, None] & (at_d < WIDTH)[None, :]
    value = tl.load(x + at[:, None] * x_row + at_d[None, :], mask=mask, other=0.0).to(tl.float32)
    if count is not None:
        value /= tl.load(count + at, mask=joins, other=1.0)[:, None]
    # a select, not a product: what does not join may be no number
    pull = tl.where(joins[:, None], here[:, None] * (value - centre), 0.0)
    return tl.where(joins, here, 0.0), pull


@triton.jit
def ahead_kernel(
    v, out, share, before, order, kept, v_batch, v_head, v_row, out_batch, out_head, out_row,
    kv_heads, rows, targets,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program per tile of kept rows, row of the batch and KV head: each gets the shares of the
    rows that have it among their next `targets` kept ones.
    """
    pair = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * BLOCK_J
    count = tl.load(kept + pair).to(tl.int32)
    if begin >= count:
        return
    v += pair // kv_heads * v_batch + pair % kv_heads * v_head
    out += pair // kv_heads * out_batch + pair % kv_heads * out_head
    share += pair * rows
    before += pair * rows
    order += pair * rows
    rank, at_d = begin + tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_D)
    wide = (at_d < WIDTH)[None, :]
    # behind the kept row that the first of these no longer shares a giver with
    low = tl.load(order + begin - targets, mask=begin >= targets, other=-1) + 1
    high = tl.load(order + tl.minimum(begin + BLOCK_J, count) - 1)
    received = tl.zeros([BLOCK_J, BLOCK_D], dtype=tl.float32)
    for begun in tl.range(low, high, BLOCK_E):
        at = begun + tl.arange(0, BLOCK_E)
        given = tl.load(share + at, mask=at < high, other=0.0)
        next_rank = tl.load(before + at, mask=at < high, other=0).to(tl.int32)
        mask = (given > 0.0)[:, None] & wide
        value = tl.load(v + at[:, None] * v_row + at_d[None, :], mask=mask, other=0.0)
        passed = rank[:, None] - next_rank[None, :]
        part = tl.where((passed >= 0) & (passed < targets), given[None, :], 0.0)
        # [BLOCK_J, BLOCK_E] times [BLOCK_E, BLOCK_D]
        received = tl.dot(part, value.to(tl.float32), received, input_precision="ieee")
    row = tl.load(order + rank, mask=rank < count, other=0)
    mask = (rank < count)[:, None] & wide
    own = tl.load(v + row[:, None] * v_row + at_d[None, :], mask=mask, other=0.0).to(tl.float32)
    sink = out + row[:, None] * out_row + at_d[None, :]
    tl.store(sink, (own + received).to(out.dtype.element_ty), mask=mask)
