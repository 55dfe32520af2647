"""Scales and zeros of a step of tiles, as tuples of vectors: too narrow for asynchronous copies."""

# triton knows no starred tuples
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_units(scales, tile, at_kw, WIDTH: tl.constexpr, TILES: tl.constexpr):
    """The scales of tiles, by tile and plane."""
    WORDS: tl.constexpr = at_kw.shape[0]
    out = ()
    for i in tl.static_range(TILES):
        for p in tl.static_range(WIDTH // WORDS):
            out = out + (tl.load(scales + (tile + i) * WIDTH + p * WORDS + at_kw),)
    return out


@triton.jit
def value_units(
    scales, zeros, tile, at_vr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The scales and zeros of tokens, by block of tiles, part and group."""
    PACK: tl.constexpr = at_vr.shape[0] // ROWS
    out = ()
    for block in tl.static_range(TILES // PACK):
        for u in tl.static_range(GROUP // ROWS):
            token = (tile + block * PACK + at_vr // ROWS) * GROUP + u * ROWS + at_vr % ROWS
            for g in tl.static_range(GROUPS):
                at = token * GROUPS + g
                out = out + (tl.load(scales + at), tl.load(zeros + at))
    return out
