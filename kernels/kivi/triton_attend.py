"""Attention over codes and rings, split into parts: the half before `combine`."""

from __future__ import annotations

import triton
import triton.language as tl

from kvfx.kernels.kivi.triton_entries import entries
from kvfx.kernels.kivi.triton_loop import attend_codes
from kvfx.kernels.kivi.triton_rules import ruled


@triton.jit
def attend_kernel(
    q, k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros, k_residual, v_residual,
    length, k_quantized, v_quantized, q_position, offsets, partial, stats,
    scores, position, bias, slopes, softcap, window, chunk, entries_of_head,
    scale, q_batch, q_head, q_row, kv_heads, rows, tiles, k_ring, v_ring, parts, all_parts,
    REPEAT: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, GROUP: tl.constexpr,
    K_BITS: tl.constexpr, K_PLANES: tl.constexpr, K_ASM: tl.constexpr,
    V_BITS: tl.constexpr, V_PLANES: tl.constexpr, V_ASM: tl.constexpr,
    TAILS: tl.constexpr, NARROW: tl.constexpr, EXACT: tl.constexpr, MIXED: tl.constexpr,
    RULED: tl.constexpr, POSITIONED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PACK: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per block of query rows, part, row of the batch and KV head.

    The first TAILS parts read what is not in whole steps of tiles, and the others read those;
    without tails, all parts read token by token.
    """
    part, block = tl.program_id(0) % parts, tl.program_id(0) // parts
    bh = tl.program_id(1).to(tl.int64)
    batch, kv_head = bh // kv_heads, bh % kv_heads
    at_m = tl.arange(0, BLOCK_M)
    row, head = (block * BLOCK_M + at_m) // REPEAT, (block * BLOCK_M + at_m) % REPEAT
    inside = row < rows
    reads = inside
    if q_position is not None:
        reads = tl.load(q_position + batch * rows + row, mask=inside, other=-1) >= 0
    q += batch * q_batch + kv_head * REPEAT * q_head
    q_at = q + head.to(tl.int64) * q_head + row.to(tl.int64) * q_row
    # where the results of a row are, relative to those of the KV head
    first = bh * REPEAT * rows * all_parts + part
    partial += first * VALUE_WIDTH
    stats += first * 2
    out = (head * rows + row) * all_parts
    if scores is not None:
        # where the scores of a head are
        scores += (bh * REPEAT + head) * entries_of_head
    rules = None
    if RULED:
        asked, slope = None, None
        if POSITIONED:
            asked = tl.load(q_position + batch * rows + row, mask=inside, other=-1).to(tl.int32)
        if slopes is not None:
            slope = tl.load(slopes + kv_head * REPEAT + head, mask=inside, other=0.0)
            slope = slope.to(tl.float32)
        if position is not None:
            position += bh * entries_of_head
        if bias is not None:
            bias += bh * entries_of_head
        rules = (asked, slope, position, bias, softcap, window, chunk)
    live = tl.load(length + bh)
    k_coded, v_coded = tl.load(k_quantized + bh), tl.load(v_quantized + bh)
    k_codes += bh * tiles * (GROUP * WIDTH // (16 // K_BITS))
    v_codes += bh * tiles * (GROUP * VALUE_WIDTH // (16 // V_BITS))
    k_scales += bh * tiles * WIDTH
    k_zeros += bh * tiles * WIDTH
    v_scales += bh * tiles * VALUE_WIDTH
    v_zeros += bh * tiles * VALUE_WIDTH

    low, tails = 0, parts
    if TAILS > 0:
        tails = TAILS
        STEP: tl.constexpr = PACK * BLOCKS * GROUP
        steps = tl.minimum(k_coded, v_coded) // STEP
        low = steps * STEP
        if part >= TAILS:
            each = tl.cdiv(steps, parts - TAILS)
            program = bh * tl.num_programs(0) + tl.program_id(0)
            attend_codes(
                q_at, inside, reads, k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros,
                offsets + program * CHUNK * BLOCK_M, partial, stats, out, scores, rules,
                (part - TAILS) * each, tl.minimum((part - TAILS + 1) * each, steps), scale, at_m,
                NARROW, EXACT, WIDTH, VALUE_WIDTH, GROUP, K_BITS, K_PLANES, K_ASM,
                V_BITS, V_PLANES, V_ASM, BLOCK_M, PACK, BLOCKS, CHUNK, STAGES,
            )  # fmt: skip
    if part < tails:
        each = tl.cdiv(tl.cdiv(live - low, BLOCK_N), tails) * BLOCK_N
        low += part * each
        high = tl.minimum(low + each, live)
        k_residual += bh * k_ring * WIDTH
        v_residual += bh * v_ring * VALUE_WIDTH
        attend_tokens(
            q_at, inside, reads, k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros,
            k_residual, v_residual, k_coded, v_coded, k_ring, v_ring,
            partial, stats, out, scores, rules, low, high, scale,
            EXACT, MIXED, WIDTH, VALUE_WIDTH, GROUP, K_BITS, K_PLANES, V_BITS, V_PLANES,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
        )  # fmt: skip


@triton.jit
def attend_tokens(
    q_at, inside, reads, k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros,
    k_residual, v_residual, k_coded, v_coded, k_ring, v_ring,
    partial, stats, out, scores, rules, low, high, scale,
    EXACT: tl.constexpr, MIXED: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    GROUP: tl.constexpr, K_BITS: tl.constexpr, K_PLANES: tl.constexpr,
    V_BITS: tl.constexpr, V_PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the part of the tokens low to high, each from its words or from its ring."""
    # fp16 and bf16 are exact in tf32, and so are codes
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    at_d, at_v, at_n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    mask = inside[:, None] & (at_d < WIDTH)[None, :]
    query = tl.load(q_at[:, None] + at_d[None, :], mask=mask, other=0.0).to(tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    for start in tl.range(low, high, BLOCK_N, num_stages=1):
        token = start + at_n
        key = entries(
            token, high, k_coded, k_codes, k_scales, k_zeros, k_residual, k_ring,
            True, MIXED, WIDTH, GROUP, K_BITS, K_PLANES, BLOCK_D,
        )  # fmt: skip
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        if rules is not None:
            score = ruled(score, token, token < high, rules, False)
        score = tl.where(reads[:, None] & (token < high)[None, :], score, float("-inf"))
        if scores is not None:
            there = inside[:, None] & (token < high)[None, :]
            tl.store(scores[:, None] + token[None, :], score, mask=there)
        best = tl.maximum(m, tl.max(score, 1))
        # -inf minus -inf is no number
        base = tl.where(best == float("-inf"), 0.0, best)
        weight = tl.exp2(score - base[:, None])
        decay = tl.exp2(m - base)
        total = total * decay + tl.sum(weight, 1)
        value = entries(
            token, high, v_coded, v_codes, v_scales, v_zeros, v_residual, v_ring,
            False, MIXED, VALUE_WIDTH, GROUP, V_BITS, V_PLANES, BLOCK_V,
        )  # fmt: skip
        acc = tl.dot(weight, value, acc * decay[:, None], input_precision=PRECISION)
        m = best
    tl.store(stats + out * 2, m, mask=inside)
    tl.store(stats + out * 2 + 1, total, mask=inside)
    mask = inside[:, None] & (at_v < VALUE_WIDTH)[None, :]
    at = partial + out.to(tl.int64)[:, None] * VALUE_WIDTH + at_v[None, :]
    tl.store(at, acc, mask=mask)
