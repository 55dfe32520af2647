"""Rows become tiles: the quantizer and the words, a part and a plane at a time.

All of it in fp32 with exact division, so that codes are those of the reference bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvfx.kernels.kivi.quantizer import LARGEST as _LARGEST
from kvfx.kernels.kivi.quantizer import SMALLEST as _SMALLEST

LARGEST, SMALLEST = tl.constexpr(_LARGEST), tl.constexpr(_SMALLEST)
# a number of this size has no bits behind the point: adding it rounds, half to even
WHOLE = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def rows_of(
    token, there, channel, inside, x, x_row, order, residual, ring, length, WIDTH: tl.constexpr
):
    """Exact rows as fp32 [N, W], zeros where not `there` [N] and `inside` [W]: from the ring below
    `length`, else from the new rows x in their `order` (None: there are none).
    """
    mask = there[:, None] & inside[None, :]
    old = mask & (token < length)[:, None]
    at = residual + (token % ring)[:, None] * WIDTH + channel[None, :]
    out = tl.load(at, mask=old, other=0.0).to(tl.float32)
    if x is not None:
        new = there & (token >= length)
        row = tl.load(order + (token - length), mask=new, other=0).to(tl.int64)
        new = mask & (token >= length)[:, None]
        value = tl.load(x + row[:, None] * x_row + channel[None, :], mask=new, other=0.0)
        # as the ring would hold it
        value = value.to(residual.dtype.element_ty).to(tl.float32)
        out = tl.where(new, value, out)
    return out


@triton.jit
def parameters(low, high, BITS: tl.constexpr):
    """Scale and zero (fp16) of groups between low and high."""
    scale = tl.div_rn(high - low, low * 0.0 + ((1 << BITS) - 1))
    scale = tl.minimum(tl.maximum(scale, SMALLEST), LARGEST)
    zero = tl.minimum(tl.maximum(low, -LARGEST), LARGEST)
    return scale.to(tl.float16), zero.to(tl.float16)


@triton.jit
def encode(x, scale, zero, BITS: tl.constexpr):
    """The nearest codes, int32; scale and zero are fp32 like x."""
    code = tl.div_rn(x - zero, scale)
    code = tl.minimum(tl.maximum(code, 0.0), (1 << BITS) - 1.0)
    return ((code + WHOLE) - WHOLE).to(tl.int32)


@triton.jit
def key_tile(
    first, codes, scales, zeros, x, x_row, order, residual, ring, length,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Write the words and parameters of the keys first to first + GROUP, at their pointers."""
    PARTS: tl.constexpr = 16 // BITS // PLANES
    ROWS: tl.constexpr = GROUP // PARTS
    WORDS: tl.constexpr = WIDTH // PLANES
    at_r, at_w = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_W)
    mask = (at_r < ROWS)[:, None] & (at_w < WORDS)[None, :]
    word = tl.zeros([BLOCK_R, BLOCK_W], dtype=tl.int32)
    for p in tl.static_range(PLANES):
        low = tl.full([BLOCK_W], float("inf"), dtype=tl.float32)
        high = tl.full([BLOCK_W], float("-inf"), dtype=tl.float32)
        for u in tl.static_range(PARTS):
            row = rows_of(
                first + u * ROWS + at_r, at_r < ROWS, at_w + p * WORDS, at_w < WORDS,
                x, x_row, order, residual, ring, length, WIDTH,
            )  # fmt: skip
            low = tl.minimum(low, tl.min(tl.where(mask, row, float("inf")), 0))
            high = tl.maximum(high, tl.max(tl.where(mask, row, float("-inf")), 0))
        # no channel, no bounds
        low = tl.where(at_w < WORDS, low, 0.0)
        high = tl.where(at_w < WORDS, high, 0.0)
        scale, zero = parameters(low, high, BITS)
        tl.store(scales + p * WORDS + at_w, scale, mask=at_w < WORDS)
        tl.store(zeros + p * WORDS + at_w, zero, mask=at_w < WORDS)
        for u in tl.static_range(PARTS):
            row = rows_of(
                first + u * ROWS + at_r, at_r < ROWS, at_w + p * WORDS, at_w < WORDS,
                x, x_row, order, residual, ring, length, WIDTH,
            )  # fmt: skip
            code = encode(row, scale.to(tl.float32)[None, :], zero.to(tl.float32)[None, :], BITS)
            word = word | (code << ((u * PLANES + p) * BITS))
    tl.store(codes + at_r[:, None] * WORDS + at_w[None, :], word.to(tl.int16), mask=mask)


@triton.jit
def value_tile(
    first, coded, target, codes, scales, zeros, x, x_row, order, residual, ring, length,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Write the values coded to target of the tile that begins at token `first`, at its pointers.

    Values below `coded` keep their codes, those from `target` on get zeros for now.
    """
    PARTS: tl.constexpr = 16 // BITS // PLANES
    ROWS: tl.constexpr = GROUP // PARTS
    WORDS: tl.constexpr = WIDTH // PLANES
    GROUPS: tl.constexpr = WIDTH // GROUP
    at_r, at_w, at_g = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_G)
    inside = (at_r < ROWS)[:, None] & (at_w < WORDS)[None, :]
    for u in tl.static_range(PARTS):
        at = u * ROWS + at_r
        fresh = (at_r < ROWS) & (first + at >= coded) & (first + at < target)
        for g in tl.static_range(GROUPS):
            mask = fresh[:, None] & (at_g < GROUP)[None, :]
            group = rows_of(
                first + at, fresh, at_g + g * GROUP, at_g < GROUP,
                x, x_row, order, residual, ring, length, WIDTH,
            )  # fmt: skip
            low = tl.min(tl.where(mask, group, float("inf")), 1)
            high = tl.max(tl.where(mask, group, float("-inf")), 1)
            scale, zero = parameters(tl.where(fresh, low, 0.0), tl.where(fresh, high, 0.0), BITS)
            tl.store(scales + at * GROUPS + g, scale, mask=fresh)
            tl.store(zeros + at * GROUPS + g, zero, mask=fresh)
    # other threads read them
    tl.debug_barrier()
    where = codes + at_r[:, None] * WORDS + at_w[None, :]
    begun = (first + at_r * 0 < coded)[:, None] & inside
    old = tl.load(where, mask=begun, other=0).to(tl.int32)
    word = tl.zeros([BLOCK_R, BLOCK_W], dtype=tl.int32)
    for u in tl.static_range(PARTS):
        at = u * ROWS + at_r
        fresh = (at_r < ROWS) & (first + at >= coded) & (first + at < target)
        mask = inside & fresh[:, None]
        for p in tl.static_range(PLANES):
            row = rows_of(
                first + at, fresh, at_w + p * WORDS, at_w < WORDS,
                x, x_row, order, residual, ring, length, WIDTH,
            )  # fmt: skip
            unit = at[:, None] * GROUPS + ((at_w + p * WORDS) // GROUP)[None, :]
            scale = tl.load(scales + unit, mask=mask, other=1.0).to(tl.float32)
            zero = tl.load(zeros + unit, mask=mask, other=0.0).to(tl.float32)
            code = tl.where(mask, encode(row, scale, zero, BITS), 0)
            kept = (old >> ((u * PLANES + p) * BITS)) & ((1 << BITS) - 1)
            code = tl.where((first + at < coded)[:, None], kept, code)
            word = word | (code << ((u * PLANES + p) * BITS))
    # the old words have been read by all
    tl.debug_barrier()
    tl.store(where, word.to(tl.int16), mask=inside)
