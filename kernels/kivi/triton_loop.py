"""Attention straight from the words of whole tiles: the loop that reads the cache.

Nothing is masked and nothing is dequantized. A tile's scales go into the query, its zeros into the
start of its scores, a token's scale into its weight, its zero into a sum beside the values'.
"""

# triton knows no starred tuples
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from kvfx.kernels.kivi.triton_rules import ruled_tiles
from kvfx.kernels.kivi.triton_sides import (
    add_zeros,
    add_zeros_by_product,
    blank,
    by_head,
    by_token,
    decayed,
    product,
    regroup,
    zero_of,
)
from kvfx.kernels.kivi.triton_units import key_units, value_units
from kvfx.kernels.kivi.triton_unpack import unpack

# what a masked code has to be multiplied by, beside the factor of its plane
UNIT = tl.constexpr(2.0**24)


@triton.jit
def attend_codes(
    q_at, inside, reads, k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros, offsets,
    partial, stats, out, scores_of_heads, rules, first, last, scale, at_m,
    NARROW: tl.constexpr, EXACT: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, GROUP: tl.constexpr,
    K_BITS: tl.constexpr, K_PLANES: tl.constexpr, K_ASM: tl.constexpr,
    V_BITS: tl.constexpr, V_PLANES: tl.constexpr, V_ASM: tl.constexpr,
    BLOCK_M: tl.constexpr, PACK: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write the part of the steps first to last; a step is BLOCKS times PACK tiles."""
    K_WORDS: tl.constexpr = WIDTH // K_PLANES
    K_PARTS: tl.constexpr = 16 // K_BITS // K_PLANES
    K_ROWS: tl.constexpr = GROUP // K_PARTS
    V_WORDS: tl.constexpr = VALUE_WIDTH // V_PLANES
    V_PARTS: tl.constexpr = 16 // V_BITS // V_PLANES
    V_ROWS: tl.constexpr = GROUP // V_PARTS
    GROUPS: tl.constexpr = VALUE_WIDTH // GROUP
    # sums per thread are cheap while there is room for them
    BY_PRODUCT: tl.constexpr = (4 if NARROW else 2) < GROUPS
    # words of one row and one plane that share a group
    RUN: tl.constexpr = min(V_WORDS, GROUP)
    RUNS: tl.constexpr = V_WORDS // RUN
    STEP: tl.constexpr = BLOCKS * PACK
    NUMBER: tl.constexpr = tl.float32 if EXACT else tl.float16
    at_kw, at_kr = tl.arange(0, K_WORDS), tl.arange(0, PACK * K_ROWS)
    at_vw, at_vr = tl.arange(0, RUN), tl.arange(0, PACK * V_ROWS)

    query, largest = _normalized(q_at, inside, at_kw, K_BITS, K_PLANES, NARROW, NUMBER)
    factor = largest * (scale * UNIT)
    if rules is not None:
        # they want scores as they are
        units, factor = factor, tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    weights = blank(BLOCK_M, PACK * V_ROWS, NARROW)
    acc, zero = (), ()
    for _ in tl.static_range(V_PLANES * RUNS):
        acc = acc + (blank(BLOCK_M, RUN, NARROW),)
    if BY_PRODUCT:
        zero = zero + (blank(BLOCK_M, GROUPS, NARROW),)
    else:
        for _ in tl.static_range(GROUPS):
            zero = zero + (blank(BLOCK_M, PACK * V_ROWS, NARROW),)

    for begin in tl.range(first, last, CHUNK // STEP, num_stages=1):
        _store_offsets(
            query, k_zeros, offsets, begin * STEP, last * STEP, at_kw, at_m,
            WIDTH, K_BITS, CHUNK, NARROW, NUMBER,
        )  # fmt: skip
        end = tl.minimum(begin + CHUNK // STEP, last)
        k_units = key_units(k_scales, begin * STEP, at_kw, WIDTH, STEP)
        v_units = value_units(v_scales, v_zeros, begin * STEP, at_vr, GROUP, V_ROWS, GROUPS, STEP)
        for step in tl.range(begin, end, num_stages=STAGES):
            # too narrow for asynchronous copies: loaded one step ahead by hand
            later = tl.minimum(step + 1, last - 1) * STEP
            next_k_units = key_units(k_scales, later, at_kw, WIDTH, STEP)
            next_v_units = value_units(v_scales, v_zeros, later, at_vr, GROUP, V_ROWS, GROUPS, STEP)
            scores = ()
            for block in tl.static_range(BLOCKS):
                tile = (step * BLOCKS + block) * PACK
                at = k_codes + (tile * K_ROWS + at_kr)[:, None] * K_WORDS + at_kw[None, :]
                codes = unpack(tl.load(at), K_BITS, K_PLANES, K_ASM)
                folded, start = (), ()
                for i in tl.static_range(PACK):
                    start = start + (tl.load(offsets + (tile + i - begin * STEP) * BLOCK_M + at_m),)
                    for p in tl.static_range(K_PLANES):
                        unit = k_units[(block * PACK + i) * K_PLANES + p].to(NUMBER)
                        folded = folded + (query[p] * by_token(unit, NARROW),)
                own = ()
                for u in tl.static_range(K_PARTS):
                    s = _scores(folded, start, codes, u, at_kr // K_ROWS, K_PLANES, PACK, NARROW)
                    own = own + (s,)
                own = regroup(own, BLOCK_M, PACK, GROUP, K_PARTS, V_PARTS)
                if rules is not None:
                    own = ruled_tiles(own, units, tile, at_vr, rules, GROUP, V_ROWS, NARROW)
                scores = scores + own
            best = scores[0]
            for i in tl.static_range(1, BLOCKS * V_PARTS):
                best = tl.maximum(best, scores[i])
            top = tl.maximum(m, tl.max(best, 0 if NARROW else 1) * factor)
            base = top
            if rules is not None:
                # -inf minus -inf is no number
                base = tl.where(top == float("-inf"), 0.0, top)
            decay = tl.exp2(m - base)
            m = top
            weights = weights * by_head(decay, NARROW)
            acc, zero = decayed(acc, decay, NARROW), decayed(zero, decay, NARROW)
            for block in tl.static_range(BLOCKS):
                tile = (step * BLOCKS + block) * PACK
                codes = ()
                for run in tl.static_range(RUNS):
                    at = v_codes + (tile * V_ROWS + at_vr)[:, None] * V_WORDS
                    word = tl.load(at + (run * RUN + at_vw)[None, :])
                    codes = codes + unpack(word, V_BITS, V_PLANES, V_ASM)
                for u in tl.static_range(V_PARTS):
                    score = scores[block * V_PARTS + u]
                    if scores_of_heads is not None:
                        token = (tile + at_vr // V_ROWS) * GROUP + u * V_ROWS + at_vr % V_ROWS
                        at = by_head(scores_of_heads, NARROW) + by_token(token, NARROW)
                        raw = score * by_head(factor, NARROW)
                        tl.store(at, raw, mask=by_head(inside, NARROW))
                    weight = tl.exp2(score * by_head(factor, NARROW) - by_head(base, NARROW))
                    weights += weight
                    if BY_PRODUCT:
                        token = (tile + at_vr // V_ROWS) * GROUP + u * V_ROWS + at_vr % V_ROWS
                        zero = add_zeros_by_product(
                            zero, weight, v_zeros, token, GROUPS, NARROW, NUMBER
                        )
                    else:
                        zero = add_zeros(zero, weight, v_units, block * V_PARTS + u, GROUPS, NARROW)
                    more = ()
                    for i in tl.static_range(V_PLANES * RUNS):
                        if i * RUN % GROUP == 0:
                            unit = v_units[((block * V_PARTS + u) * GROUPS + i * RUN // GROUP) * 2]
                            scaled = weight * by_token(unit.to(tl.float32), NARROW)
                            scaled = scaled.to(NUMBER)
                        code = codes[i % RUNS * (16 // V_BITS) + u * V_PLANES + i // RUNS]
                        more = more + (product(scaled, code.to(NUMBER), acc[i], NARROW),)
                    acc = more
            k_units, v_units = next_k_units, next_v_units

    # rows that read nothing have seen nothing
    total = tl.where(reads, tl.sum(weights, 0 if NARROW else 1), 0.0)
    tl.store(stats + out * 2, tl.where(reads, m, float("-inf")), mask=inside)
    tl.store(stats + out * 2 + 1, total, mask=inside)
    for i in tl.static_range(V_PLANES * RUNS):
        rest = zero_of(zero, i * RUN // GROUP, GROUPS, BY_PRODUCT, NARROW)
        x = acc[i] * (UNIT / (1 << (i // RUNS * V_BITS % 8))) + by_head(rest, NARROW)
        at = (
            partial
            + by_head(out.to(tl.int64) * VALUE_WIDTH, NARROW)
            + by_token(at_vw + i * RUN, NARROW)
        )
        tl.store(at, tl.where(by_head(reads, NARROW), x, 0.0), mask=by_head(inside, NARROW))


@triton.jit
def _normalized(
    q_at, inside, at_kw, BITS: tl.constexpr, PLANES: tl.constexpr,
    NARROW: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Planes of queries below 1, so that products with any fp16 scale are finite, divided by the
    factor of their codes; and the power of two per head that they were divided by.
    """
    WORDS: tl.constexpr = at_kw.shape[0]
    largest = tl.zeros([inside.shape[0]], dtype=tl.float32)
    planes = ()
    for p in tl.static_range(PLANES):
        at = by_head(q_at, NARROW) + by_token(at_kw + p * WORDS, NARROW)
        x = tl.load(at, mask=by_head(inside, NARROW), other=0.0).to(tl.float32)
        planes = planes + (x,)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 0 if NARROW else 1))
    # nothing but the exponent, and one more
    largest = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 2.0
    largest = tl.where(largest > 0.0, largest, 1.0)
    out = ()
    for p in tl.static_range(PLANES):
        x = planes[p] / by_head(largest, NARROW) * (1.0 / (1 << (p * BITS % 8)))
        out = out + (x.to(NUMBER),)
    return out, largest


@triton.jit
def _store_offsets(
    query, k_zeros, offsets, first, last, at_kw, at_m,
    WIDTH: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr,
    NARROW: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Write what the zeros of CHUNK tiles add to scores [CHUNK, M]: one product for all."""
    WORDS: tl.constexpr = at_kw.shape[0]
    at_c = tl.arange(0, CHUNK)
    out = blank(at_m.shape[0], CHUNK, NARROW)
    for p in tl.static_range(WIDTH // WORDS):
        at = k_zeros + (first + at_c)[:, None] * WIDTH + (at_kw + p * WORDS)[None, :]
        x = tl.load(at, mask=(first + at_c < last)[:, None], other=0.0)
        part = product(
            query[p], tl.trans(x.to(NUMBER)), blank(at_m.shape[0], CHUNK, NARROW), NARROW
        )
        out += part * (1 << (p * BITS % 8))
    # the loop before may still read what it left here
    tl.debug_barrier()
    at = offsets + by_token(at_c, NARROW) * at_m.shape[0] + by_head(at_m, NARROW)
    tl.store(at, out * (1.0 / UNIT))
    tl.debug_barrier()


@triton.jit
def _scores(
    scaled, start, codes, u: tl.constexpr, tile,
    PLANES: tl.constexpr, PACK: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """The scores of one part of PACK tiles, whose rows lie in `tile` of them."""
    out = _tile_scores(scaled, start[0], codes, u, 0, PLANES, NARROW)
    for i in tl.static_range(1, PACK):
        other = _tile_scores(scaled, start[i], codes, u, i, PLANES, NARROW)
        out = tl.where(by_token(tile == i, NARROW), other, out)
    return out


@triton.jit
def _tile_scores(
    scaled, start, codes, u: tl.constexpr, i: tl.constexpr,
    PLANES: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Queries in the scales of tile i times the codes of part u."""
    out = blank(start.shape[0], codes[0].shape[0], NARROW) + by_head(start, NARROW)
    for p in tl.static_range(PLANES):
        code = tl.trans(codes[u * PLANES + p].to(scaled[0].dtype))
        out = product(scaled[i * PLANES + p], code, out, NARROW)
    return out
