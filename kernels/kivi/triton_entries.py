"""Entries one by one, wherever they are: words or ring."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def entries(
    token, high, coded, codes, scales, zeros, residual, ring,
    KEYS: tl.constexpr, MIXED: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys or values of tokens [N] below `high` as fp32 [N, BLOCK], zeros elsewhere.

    Those below `coded` are read from words (where MIXED: elsewhere there are none).
    """
    WORDS: tl.constexpr = WIDTH // PLANES
    PARTS: tl.constexpr = 16 // BITS // PLANES
    ROWS: tl.constexpr = GROUP // PARTS
    channel = tl.arange(0, BLOCK)
    here = (token < high)[:, None] & (channel < WIDTH)[None, :]
    exact = here
    if MIXED:
        exact = here & (token >= coded)[:, None]
    slot = (token % ring).to(tl.int64)
    at = residual + slot[:, None] * WIDTH + channel[None, :]
    out = tl.load(at, mask=exact, other=0.0).to(tl.float32)
    if MIXED:
        here = here & (token < coded)[:, None]
        tile, within = (token // GROUP).to(tl.int64), token % GROUP
        at = ((tile * ROWS + within % ROWS) * WORDS)[:, None] + (channel % WORDS)[None, :]
        word = tl.load(codes + at, mask=here, other=0).to(tl.int32)
        field = (within // ROWS * PLANES)[:, None] + (channel // WORDS)[None, :]
        code = ((word >> (field * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
        if KEYS:
            at = (tile * WIDTH)[:, None] + channel[None, :]
        else:
            at = (token.to(tl.int64) * (WIDTH // GROUP))[:, None] + (channel // GROUP)[None, :]
        scale = tl.load(scales + at, mask=here, other=0.0).to(tl.float32)
        zero = tl.load(zeros + at, mask=here, other=0.0).to(tl.float32)
        out = tl.where(here, code * scale + zero, out)
    return out
