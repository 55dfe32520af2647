"""KIVI entries: the oldest tokens as packed low-bit codes, the newest ones exact in a ring.

The operands `*buffers` are those of `Entries`, in its order. A ring that is full gives up its
oldest block before the next write. Whatever no counter covers is garbage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.kernels.common.attention import Rules, attend_rows
from kvfx.kernels.common.rows import kept_first
from kvfx.kernels.kivi.attend import attend_step, weights_of_entries
from kvfx.kernels.kivi.layout import Entries, Planes, quantized_of, rows_and_heads, schedule
from kvfx.kernels.kivi.quantizer import (
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
)
from kvfx.kernels.kivi.rows import (
    continue_tiles,
    oldest_tiles,
    pending,
    replace_tiles,
    replace_value,
    sorted_entries,
    write_ring,
    write_tiles,
)
from kvfx.kernels.kivi.rules import ruled


def store(
    k: Tensor, v: Tensor, keep: Tensor, *buffers: Tensor,
    k_bits: int, v_bits: int, group_size: int, residual: int, rule: str,
) -> None:  # fmt: skip
    """Write the kept rows of k, v [B, K, S, D] as if they were appended and flushed one by one."""
    has, due = Entries(*buffers), schedule(group_size, residual, rule)
    order, count = kept_first(keep)
    total = has.length.long() + count

    target = quantized_of(total, due.k_ring, due.k_block)
    tiles, token = pending(k, order, has.k_residual, has.length, has.k_quantized, total, group_size)
    codes, scale, zero = quantize_keys(tiles, k_bits)
    new = (Planes(k_bits, k.shape[-1], group_size).pack(codes), scale, zero)
    write_tiles(token, target, (has.k_codes, has.k_scales, has.k_zeros), new)
    write_ring(k, order, has.k_residual, has.length, target, total)
    has.k_quantized.copy_(target)

    target = quantized_of(total, due.v_ring, due.v_block)
    tiles, token = pending(v, order, has.v_residual, has.length, has.v_quantized, total, group_size)
    new = continue_tiles(quantize_values(tiles, v_bits, group_size), token, target, has, v_bits)
    write_tiles(token, target, (has.v_codes, has.v_scales, has.v_zeros), new)
    write_ring(v, order, has.v_residual, has.length, target, total)
    has.v_quantized.copy_(target)
    has.length.copy_(total)


def append(
    k: Tensor, v: Tensor, keep: Tensor, *buffers: Tensor,
    k_bits: int, v_bits: int, group_size: int, residual: int, rule: str,
) -> None:  # fmt: skip
    """Write one row k, v [B, K, 1, D] behind the live entries.

    In kivi mode, the value that thereby falls out of its ring becomes codes.
    """
    del k_bits
    has, due = Entries(*buffers), schedule(group_size, residual, rule)
    kept = keep[..., 0]
    if due.v_block == 1:
        full = kept & (has.length - has.v_quantized == due.v_ring)
        replace_value(full, has, v_bits, group_size, due.v_ring)
    b, h = rows_and_heads(k, 0)
    for row, recent, ring in ((k, has.k_residual, due.k_ring), (v, has.v_residual, due.v_ring)):
        slot = has.length.long() % ring
        # the slot of a row that is not kept may hold a live token
        entry = torch.where(kept[..., None], row[:, :, 0].to(recent.dtype), recent[b, h, slot])
        recent.index_put_((b, h, slot), entry)
    has.length.add_(kept.to(has.length.dtype))


def flush(
    *buffers: Tensor, k_bits: int, v_bits: int, group_size: int, residual: int, rule: str
) -> None:
    """Quantize the oldest block of every full ring; other rows and heads stay as they are."""
    has, due = Entries(*buffers), schedule(group_size, residual, rule)
    full = has.length - has.k_quantized == due.k_ring
    tiles, tile = oldest_tiles(has.k_residual, has.k_quantized, due.k_block, group_size)
    codes, scale, zero = quantize_keys(tiles, k_bits)
    new = (Planes(k_bits, tiles.shape[-1], group_size).pack(codes), scale, zero)
    replace_tiles(full, tile, (has.k_codes, has.k_scales, has.k_zeros), new)
    has.k_quantized.add_(full.to(has.k_quantized.dtype) * due.k_block)

    full = has.length - has.v_quantized == due.v_ring
    if due.v_block == 1:
        replace_value(full, has, v_bits, group_size, due.v_ring)
        return
    tiles, tile = oldest_tiles(has.v_residual, has.v_quantized, due.v_block, group_size)
    codes, scale, zero = quantize_values(tiles, v_bits, group_size)
    new = (Planes(v_bits, tiles.shape[-1], group_size).pack(codes), scale, zero)
    replace_tiles(full, tile, (has.v_codes, has.v_scales, has.v_zeros), new)
    has.v_quantized.add_(full.to(has.v_quantized.dtype) * due.v_block)


def attend(
    q: Tensor, position_ids: Tensor,
    k_codes: Tensor, k_scales: Tensor, k_zeros: Tensor, v_codes: Tensor, v_scales: Tensor,
    v_zeros: Tensor, k_residual: Tensor, v_residual: Tensor, length: Tensor, k_quantized: Tensor,
    v_quantized: Tensor, position: Tensor | None = None, bias: Tensor | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, k_bits: int, v_bits: int, group_size: int, residual: int, rule: str,
    softcap: float = 0.0, window: int | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one row q [B, H, 1, D] over the live entries, never unpacked: [B, H, 1, Dv].

    Entries are at `position` [B, K, N] (None: at their index) and carry `bias` [B, K, N], both in
    the order of `load`; the others are `Rules`.
    """
    has = Entries(
        k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros, k_residual, v_residual, length,
        k_quantized, v_quantized,
    )  # fmt: skip
    given = ruled(Rules(slopes, sinks, softcap, window, chunk), position_ids, position, bias)
    due = schedule(group_size, residual, rule)
    return attend_step(q, has, due, scale, k_bits, v_bits, group_size, given)[0]


def attend_scored(
    q: Tensor, position_ids: Tensor, score: Tensor,
    k_codes: Tensor, k_scales: Tensor, k_zeros: Tensor, v_codes: Tensor, v_scales: Tensor,
    v_zeros: Tensor, k_residual: Tensor, v_residual: Tensor, length: Tensor, k_quantized: Tensor,
    v_quantized: Tensor, position: Tensor | None = None, bias: Tensor | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, k_bits: int, v_bits: int, group_size: int, residual: int, rule: str,
    decay: float = 1.0, softcap: float = 0.0, window: int | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """What `attend` returns; score [B, K, N] fp32 becomes `decay` times itself plus the weights
    that the entries get, summed over the query heads of their KV head.
    """
    has = Entries(
        k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros, k_residual, v_residual, length,
        k_quantized, v_quantized,
    )  # fmt: skip
    given = ruled(Rules(slopes, sinks, softcap, window, chunk), position_ids, position, bias)
    due = schedule(group_size, residual, rule)
    out, weight = attend_step(q, has, due, scale, k_bits, v_bits, group_size, given)
    score.copy_(score * decay + weights_of_entries(weight.sum(2), has, due))
    return out


def extend(
    q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor,
    k_codes: Tensor, k_scales: Tensor, k_zeros: Tensor, v_codes: Tensor, v_scales: Tensor,
    v_zeros: Tensor, k_residual: Tensor, v_residual: Tensor, length: Tensor, k_quantized: Tensor,
    v_quantized: Tensor, position: Tensor | None = None, bias: Tensor | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, k_bits: int, v_bits: int, group_size: int, residual: int, rule: str,
    softcap: float = 0.0, window: int | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of S rows over the live entries and themselves, not stored yet: [B, H, S, Dv]. The
    optional operands are those of `attend`.
    """
    has = Entries(
        k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros, k_residual, v_residual, length,
        k_quantized, v_quantized,
    )  # fmt: skip
    k_past, v_past, live = load(
        *has, k_bits=k_bits, v_bits=v_bits, group_size=group_size, residual=residual, rule=rule
    )
    k_past, v_past = k_past.to(k.dtype), v_past.to(v.dtype)
    rules = Rules(slopes, sinks, softcap, window, chunk)
    if rules.positioned and position is None:
        position = torch.arange(live.shape[2], device=q.device).expand(q.shape[0], 1, -1)
    return attend_rows(q, k, v, position_ids, k_past, v_past, live, scale, rules, position, bias)


def load(
    *buffers: Tensor, k_bits: int, v_bits: int, group_size: int, residual: int, rule: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries by position: k [B, K, T, D], v [B, K, T, Dv], live [B, K, T].

    T is what tiles and the ring of keys may hold together; what is not live is zero.
    """
    has, due = Entries(*buffers), schedule(group_size, residual, rule)
    k_planes = Planes(k_bits, has.k_residual.shape[-1], group_size)
    v_planes = Planes(v_bits, has.v_residual.shape[-1], group_size)
    size = has.k_scales.shape[2] * group_size + due.k_ring
    k = dequantize_keys(k_planes.unpack(has.k_codes), has.k_scales, has.k_zeros).flatten(2, 3)
    v = dequantize_values(v_planes.unpack(has.v_codes), has.v_scales, has.v_zeros).flatten(2, 3)
    k = sorted_entries(k, has.k_residual, has.k_quantized, has.length, size)
    v = sorted_entries(v, has.v_residual, has.v_quantized, has.length, size)
    return k, v, torch.arange(size, device=k.device) < has.length[..., None]
