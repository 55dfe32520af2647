"""KIVI entries: the oldest tokens as packed low-bit codes, the newest ones exact in a ring.

Buffers, in this order (G = group_size, R and W of `Planes`, N tiles):
`k_codes` int16 [B, K, N, R, W], `k_scales`, `k_zeros` fp16 [B, K, N, D], `v_codes` int16 [B, K, N, R, W], `v_scales`, `v_zeros`
fp16 [B, K, N, G, Dv / G], `k_residual` [B, K, k_ring, D], `v_residual` [B, K, v_ring, Dv] (token t in slot t % ring), and int32 [B, K]
`length` (live entries), `k_quantized`, `v_quantized` (the oldest entries, whose keys and values are codes).
A ring that is full gives up its oldest block before the next write. Whatever no counter covers is garbage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.kernels.common.attention import attend_rows
from kvfx.kernels.common.rows import kept_first
from kvfx.kernels.kivi.attend import scores_of_codes, sum_of_codes
from kvfx.kernels.kivi.layout import (
    Planes,
    as_word,
    quantized_of,
    ring_tokens,
    rows_and_heads,
    schedule,
)
from kvfx.kernels.kivi.quantizer import (
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
)
from kvfx.kernels.kivi.rows import (
    oldest_tiles,
    pending,
    replace_tiles,
    sorted_entries,
    write_ring,
    write_tiles,
)


def store(
    k: Tensor, v: Tensor, keep: Tensor,
    k_codes: Tensor, k_scales: Tensor, k_zeros: Tensor, v_codes: Tensor, v_scales: Tensor, v_zeros: Tensor,
    k_residual: Tensor, v_residual: Tensor, length: Tensor, k_quantized: Tensor, v_quantized: Tensor,
    k_bits: int, v_bits: int, group_size: int, residual: int, mode: str,
) -> None:  # fmt: skip
    """Write the kept rows of k, v [B, K, S, D] behind the live entries, as if appended and flushed one by one."""
    due = schedule(group_size, residual, mode)
    order, count = kept_first(keep)
    total = length.long() + count

    target = quantized_of(total, due.k_ring, due.k_block)
    tiles, token = pending(k, order, k_residual, length, k_quantized, total, group_size)
    codes, scale, zero = quantize_keys(tiles, k_bits)
    complete = token[..., 0] < target[..., None]
    words = Planes(k_bits, k.shape[-1], group_size).pack(codes)
    write_tiles(
        token[..., 0] // group_size, complete, (k_codes, k_scales, k_zeros), (words, scale, zero)
    )
    write_ring(k, order, k_residual, length, target, total)
    k_quantized.copy_(target)

    target = quantized_of(total, due.v_ring, due.v_block)
    tiles, token = pending(v, order, v_residual, length, v_quantized, total, group_size)
    planes = Planes(v_bits, v.shape[-1], group_size)
    codes, scale, zero = quantize_values(tiles, v_bits, group_size)
    # a tile that was begun keeps its codes
    b, h = rows_and_heads(v, 1)
    tile = (token[..., 0] // group_size).clamp(max=v_scales.shape[2] - 1)
    begun = (token < v_quantized[..., None, None])[..., None]
    codes = torch.where(begun, planes.unpack(v_codes[b, h, tile]), codes)
    scale, zero = (
        torch.where(begun, v_scales[b, h, tile], scale),
        torch.where(begun, v_zeros[b, h, tile], zero),
    )
    words = planes.pack(torch.where((token < target[..., None, None])[..., None], codes, 0))
    started = token[..., 0] < target[..., None]
    write_tiles(
        token[..., 0] // group_size, started, (v_codes, v_scales, v_zeros), (words, scale, zero)
    )
    write_ring(v, order, v_residual, length, target, total)
    v_quantized.copy_(target)
    length.copy_(total)


def append(
    k: Tensor, v: Tensor, keep: Tensor,
    k_codes: Tensor, k_scales: Tensor, k_zeros: Tensor, v_codes: Tensor, v_scales: Tensor, v_zeros: Tensor,
    k_residual: Tensor, v_residual: Tensor, length: Tensor, k_quantized: Tensor, v_quantized: Tensor,
    k_bits: int, v_bits: int, group_size: int, residual: int, mode: str,
) -> None:  # fmt: skip
    """Write one row k, v [B, K, 1, D] behind the live entries; in kivi mode the value that fell out of the ring becomes codes."""
    del k_codes, k_scales, k_zeros, k_quantized, k_bits
    due = schedule(group_size, residual, mode)
    kept = keep[..., 0]
    if due.v_block == 1:
        full = kept & (length - v_quantized == due.v_ring)
        flush_value(
            full,
            v_codes,
            v_scales,
            v_zeros,
            v_residual,
            v_quantized,
            v_bits,
            group_size,
            due.v_ring,
        )
    b, h = rows_and_heads(k, 0)
    for row, recent, ring in ((k, k_residual, due.k_ring), (v, v_residual, due.v_ring)):
        slot = length.long() % ring
        # the slot of a row that is not kept may hold a live token
        entry = torch.where(kept[..., None], row[:, :, 0].to(recent.dtype), recent[b, h, slot])
        recent.index_put_((b, h, slot), entry)
    length.add_(kept.to(length.dtype))


def flush(
    k_codes: Tensor, k_scales: Tensor, k_zeros: Tensor, v_codes: Tensor, v_scales: Tensor, v_zeros: Tensor,
    k_residual: Tensor, v_residual: Tensor, length: Tensor, k_quantized: Tensor, v_quantized: Tensor,
    k_bits: int, v_bits: int, group_size: int, residual: int, mode: str,
) -> None:  # fmt: skip
    """Quantize the oldest block of every ring that is full; rows and heads whose ring is not full stay as they are."""
    due = schedule(group_size, residual, mode)
    full = length - k_quantized == due.k_ring
    tiles, tile = oldest_tiles(k_residual, k_quantized, due.k_block, group_size)
    codes, scale, zero = quantize_keys(tiles, k_bits)
    words = Planes(k_bits, k_residual.shape[-1], group_size).pack(codes)
    replace_tiles(full, tile, (k_codes, k_scales, k_zeros), (words, scale, zero))
    k_quantized.add_(full.to(k_quantized.dtype) * due.k_block)

    full = length - v_quantized == due.v_ring
    if due.v_block == 1:
        return flush_value(
            full,
            v_codes,
            v_scales,
            v_zeros,
            v_residual,
            v_quantized,
            v_bits,
            group_size,
            due.v_ring,
        )
    tiles, tile = oldest_tiles(v_residual, v_quantized, due.v_block, group_size)
    codes, scale, zero = quantize_values(tiles, v_bits, group_size)
    words = Planes(v_bits, v_residual.shape[-1], group_size).pack(codes)
    replace_tiles(full, tile, (v_codes, v_scales, v_zeros), (words, scale, zero))
    v_quantized.add_(full.to(v_quantized.dtype) * due.v_block)
    return None


def attend(
    q: Tensor, position_ids: Tensor,
    k_codes: Tensor, k_scales: Tensor, k_zeros: Tensor, v_codes: Tensor, v_scales: Tensor, v_zeros: Tensor,
    k_residual: Tensor, v_residual: Tensor, length: Tensor, k_quantized: Tensor, v_quantized: Tensor,
    k_bits: int, v_bits: int, group_size: int, residual: int, mode: str, scale: float,
) -> Tensor:  # fmt: skip
    """Attention of one row q [B, H, 1, D] over the live entries, without unpacking them to memory: [B, H, 1, Dv]."""
    del position_ids
    due = schedule(group_size, residual, mode)
    # all but batch and tiles is static, also when traced with symbolic shapes
    kv_heads, head_dim, value_dim = (
        int(k_residual.shape[1]),
        int(k_residual.shape[3]),
        int(v_residual.shape[3]),
    )
    row = (q.float() * scale).reshape(q.shape[0], kv_heads, -1, head_dim)
    tokens = torch.arange(k_scales.shape[2] * group_size, device=q.device)

    coded = scores_of_codes(row, k_codes, k_scales, k_zeros, Planes(k_bits, head_dim, group_size))
    coded = coded.masked_fill(~(tokens < k_quantized[..., None])[:, :, None], float("-inf"))
    k_token = ring_tokens(length, due.k_ring)
    exact = torch.stack([(x[:, :, None] * k_residual.float()).sum(-1) for x in row.unbind(2)], 2)
    exact = exact.masked_fill(~(k_token >= k_quantized[..., None])[:, :, None], float("-inf"))
    weight = torch.cat((coded, exact), -1).softmax(-1)

    coded = weight[..., : tokens.shape[0]]
    live = tokens < v_quantized[..., None]
    out = sum_of_codes(
        coded, v_codes, v_scales, v_zeros, live, Planes(v_bits, value_dim, group_size)
    )
    v_token = ring_tokens(length, due.v_ring)
    v_live = v_token >= v_quantized[..., None]
    # a value may be exact while its key is a code already: where the weight of each slot of the value ring lies
    at = torch.where(
        v_token < k_quantized[..., None], v_token, tokens.shape[0] + v_token % due.k_ring
    )
    exact = weight.gather(-1, at.clamp(min=0)[:, :, None].expand(-1, -1, row.shape[2], -1))
    values = torch.where(v_live[..., None], v_residual.float(), 0.0)
    exact = torch.where(v_live[:, :, None], exact, 0.0)
    out = out + torch.stack([(x[..., None] * values).sum(2) for x in exact.unbind(2)], 2)
    return out.reshape(q.shape[0], q.shape[1], 1, value_dim).to(q.dtype)


def extend(
    q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor,
    k_codes: Tensor, k_scales: Tensor, k_zeros: Tensor, v_codes: Tensor, v_scales: Tensor, v_zeros: Tensor,
    k_residual: Tensor, v_residual: Tensor, length: Tensor, k_quantized: Tensor, v_quantized: Tensor,
    k_bits: int, v_bits: int, group_size: int, residual: int, mode: str, scale: float,
) -> Tensor:  # fmt: skip
    """Attention of S rows over the live entries and over themselves, before they are stored: [B, H, S, Dv]."""
    k_past, v_past, live = load(
        k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros, k_residual, v_residual, length, k_quantized, v_quantized,
        k_bits, v_bits, group_size, residual, mode,
    )  # fmt: skip
    return attend_rows(q, k, v, position_ids, k_past.to(k.dtype), v_past.to(v.dtype), live, scale)


def load(
    k_codes: Tensor, k_scales: Tensor, k_zeros: Tensor, v_codes: Tensor, v_scales: Tensor, v_zeros: Tensor,
    k_residual: Tensor, v_residual: Tensor, length: Tensor, k_quantized: Tensor, v_quantized: Tensor,
    k_bits: int, v_bits: int, group_size: int, residual: int, mode: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The entries as dense k [B, K, T, D], v [B, K, T, Dv], and which are live [B, K, T]; T = N * G + k_ring."""
    due = schedule(group_size, residual, mode)
    k_planes, v_planes = (
        Planes(bits, recent.shape[-1], group_size)
        for bits, recent in ((k_bits, k_residual), (v_bits, v_residual))
    )
    size = k_scales.shape[2] * group_size + due.k_ring
    k = dequantize_keys(k_planes.unpack(k_codes), k_scales, k_zeros).flatten(2, 3)
    v = dequantize_values(v_planes.unpack(v_codes), v_scales, v_zeros).flatten(2, 3)
    k = sorted_entries(k, k_residual, k_quantized, length, size)
    v = sorted_entries(v, v_residual, v_quantized, length, size)
    return k, v, torch.arange(size, device=k.device) < length[..., None]


def flush_value(
    full: Tensor, v_codes: Tensor, v_scales: Tensor, v_zeros: Tensor, v_residual: Tensor, v_quantized: Tensor,
    v_bits: int, group_size: int, ring: int,
) -> None:  # fmt: skip
    """Quantize the oldest exact value where `full` [B, K]: its fields join the words of the tile it belongs to."""
    planes = Planes(v_bits, int(v_residual.shape[3]), group_size)
    b, h = rows_and_heads(v_residual, 0)
    token = v_quantized.long()
    codes, scale, zero = quantize_values(v_residual[b, h, token % ring], v_bits, group_size)
    tile = (token // group_size).clamp(max=v_scales.shape[2] - 1)
    inside = token % group_size
    for buffer, new in ((v_scales, scale), (v_zeros, zero)):
        at = (b, h, tile, inside)
        buffer.index_put_(at, torch.where(full[..., None], new, buffer[at]))
    part, row = inside // planes.rows, inside % planes.rows
    at = (b, h, tile, row)
    old = v_codes[at]
    shift = (part * planes.planes * v_bits).to(torch.int32)[..., None]
    by_plane = codes.unflatten(-1, (planes.planes, planes.words)).unbind(-2)
    fields = sum(code << (plane * v_bits) for plane, code in enumerate(by_plane))
    # what lies above the field is garbage of later parts
    below = old.to(torch.int32) & ((1 << shift) - 1)
    v_codes.index_put_(at, torch.where(full[..., None], as_word(below | (fields << shift)), old))
    v_quantized.add_(full.to(v_quantized.dtype))
