"""Kernels that write the buffers: a prompt, one row, a block that leaves its ring, and back."""

from __future__ import annotations

import triton
import triton.language as tl

from kvfx.kernels.kivi.triton_entries import entries
from kvfx.kernels.kivi.triton_tiles import key_tile, value_tile


@triton.jit
def tiles_kernel(
    x, order, codes, scales, zeros, residual, length, coded, target,
    x_batch, x_head, x_row, kv_heads, rows, tiles, ring,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One program per tile from that of the first exact token on, row of the batch and KV head."""
    bh = tl.program_id(1).to(tl.int64)
    done, aim = tl.load(coded + bh), tl.load(target + bh)
    tile = done // GROUP + tl.program_id(0)
    if (tile * GROUP < aim) & (tile < tiles):
        live = tl.load(length + bh)
        x += bh // kv_heads * x_batch + bh % kv_heads * x_head
        order += bh * rows
        residual += bh * ring * WIDTH
        at = bh * tiles + tile
        codes += at * (GROUP * WIDTH // (16 // BITS))
        if KEYS:
            key_tile(
                tile * GROUP, codes, scales + at * WIDTH, zeros + at * WIDTH,
                x, x_row, order, residual, ring, live,
                WIDTH, GROUP, BITS, PLANES, BLOCK_R, BLOCK_W,
            )  # fmt: skip
        else:
            value_tile(
                tile * GROUP, done, aim, codes, scales + at * WIDTH, zeros + at * WIDTH,
                x, x_row, order, residual, ring, live,
                WIDTH, GROUP, BITS, PLANES, BLOCK_R, BLOCK_W, BLOCK_G,
            )  # fmt: skip


@triton.jit
def ring_kernel(
    x, order, residual, length, target, total, x_batch, x_head, x_row, kv_heads, rows, ring,
    WIDTH: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per block of new rows, row of the batch and KV head: those that stay exact."""
    bh = tl.program_id(1).to(tl.int64)
    at_s, at_d = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    token = tl.load(length + bh) + at_s
    stays = (at_s < rows) & (token >= tl.load(target + bh)) & (token < tl.load(total + bh))
    row = tl.load(order + bh * rows + at_s, mask=stays, other=0).to(tl.int64)
    mask = stays[:, None] & (at_d < WIDTH)[None, :]
    x += bh // kv_heads * x_batch + bh % kv_heads * x_head
    value = tl.load(x + row[:, None] * x_row + at_d[None, :], mask=mask, other=0.0)
    at = residual + (bh * ring + token % ring)[:, None] * WIDTH + at_d[None, :]
    tl.store(at, value.to(residual.dtype.element_ty), mask=mask)


@triton.jit
def append_kernel(
    k, v, keep, k_residual, v_residual, v_codes, v_scales, v_zeros, length, v_quantized,
    k_batch, k_head, v_batch, v_head, keep_batch, keep_head, kv_heads, tiles, k_ring, v_ring,
    LEAVES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr, PLANES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row of the batch and KV head. Where values leave one by one (LEAVES), the one
    whose slot is needed becomes codes.
    """
    bh = tl.program_id(0).to(tl.int64)
    batch, head = bh // kv_heads, bh % kv_heads
    if tl.load(keep + batch * keep_batch + head * keep_head).to(tl.int32) != 0:
        live = tl.load(length + bh)
        k_residual += bh * k_ring * WIDTH
        v_residual += bh * v_ring * VALUE_WIDTH
        if LEAVES:
            done = tl.load(v_quantized + bh)
            tile = done // GROUP
            if (live - done == v_ring) & (tile < tiles):
                at = bh * tiles + tile
                value_tile(
                    tile * GROUP, done, done + 1,
                    v_codes + at * (GROUP * VALUE_WIDTH // (16 // BITS)),
                    v_scales + at * VALUE_WIDTH, v_zeros + at * VALUE_WIDTH,
                    None, 0, None, v_residual, v_ring, live,
                    VALUE_WIDTH, GROUP, BITS, PLANES, BLOCK_R, BLOCK_W, BLOCK_G,
                )  # fmt: skip
                tl.store(v_quantized + bh, done + 1)
        at_d, at_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
        at = k + batch * k_batch + head * k_head + at_d
        key = tl.load(at, mask=at_d < WIDTH, other=0.0)
        at = v + batch * v_batch + head * v_head + at_v
        value = tl.load(at, mask=at_v < VALUE_WIDTH, other=0.0)
        at = k_residual + live % k_ring * WIDTH + at_d
        tl.store(at, key.to(k_residual.dtype.element_ty), mask=at_d < WIDTH)
        # every thread has read the value whose slot this is, and the counters
        tl.debug_barrier()
        at = v_residual + live % v_ring * VALUE_WIDTH + at_v
        tl.store(at, value.to(v_residual.dtype.element_ty), mask=at_v < VALUE_WIDTH)
        tl.store(length + bh, live + 1)


@triton.jit
def flush_kernel(
    codes, scales, zeros, residual, length, coded, tiles, ring,
    KEYS: tl.constexpr, BLOCK: tl.constexpr, ALONE: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One program per tile of a block, row of the batch and KV head; nothing where none is due.

    A program that is ALONE with its ring moves the counter.
    """
    bh = tl.program_id(1).to(tl.int64)
    live, done = tl.load(length + bh), tl.load(coded + bh)
    tile = done // GROUP + tl.program_id(0)
    if (live - done == ring) & (tile < tiles):
        residual += bh * ring * WIDTH
        at = bh * tiles + tile
        codes += at * (GROUP * WIDTH // (16 // BITS))
        if KEYS:
            key_tile(
                tile * GROUP, codes, scales + at * WIDTH, zeros + at * WIDTH,
                None, 0, None, residual, ring, live,
                WIDTH, GROUP, BITS, PLANES, BLOCK_R, BLOCK_W,
            )  # fmt: skip
        else:
            value_tile(
                tile * GROUP, done, done + BLOCK, codes, scales + at * WIDTH, zeros + at * WIDTH,
                None, 0, None, residual, ring, live,
                WIDTH, GROUP, BITS, PLANES, BLOCK_R, BLOCK_W, BLOCK_G,
            )  # fmt: skip
        if ALONE:
            tl.debug_barrier()
            tl.store(coded + bh, done + BLOCK)


@triton.jit
def load_kernel(
    out, codes, scales, zeros, residual, length, coded, tiles, ring, size,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per block of entries, row of the batch and KV head."""
    bh = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = bh * tiles
    row = entries(
        token, tl.load(length + bh), tl.load(coded + bh),
        codes + at * (GROUP * WIDTH // (16 // BITS)), scales + at * WIDTH, zeros + at * WIDTH,
        residual + bh * ring * WIDTH, ring, KEYS, True, WIDTH, GROUP, BITS, PLANES, BLOCK_D,
    )  # fmt: skip
    channel = tl.arange(0, BLOCK_D)
    mask = (token < size)[:, None] & (channel < WIDTH)[None, :]
    at = out + (bh * size + token)[:, None] * WIDTH + channel[None, :]
    tl.store(at, row.to(out.dtype.element_ty), mask=mask)
