"""Moving rows between rings and tiles: gathers and scatters per row and KV head."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.kernels.kivi.layout import Entries, Planes, as_word, rows_and_heads
from kvfx.kernels.kivi.quantizer import encode, parameters


def pending(
    x: Tensor, order: Tensor, recent: Tensor, length: Tensor, quantized: Tensor, total: Tensor,
    group_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tiles [B, K, n, G, D] from that of the first exact token on, and their tokens [B, K, n, G].

    Tokens below `length` come from the ring, the others from the new rows x [B, K, S, D].
    """
    start = quantized.long() // group_size * group_size
    tiles = -(-int((total - start).max()) // group_size)
    token = start[..., None] + torch.arange(tiles * group_size, device=x.device)
    b, h = rows_and_heads(x, 1)
    new = order.gather(-1, (token - length[..., None]).clamp(0, x.shape[2] - 1))
    rows = torch.where(
        (token < length[..., None])[..., None],
        recent[b, h, token % recent.shape[2]],
        x[b, h, new].to(recent.dtype),
    )
    return rows.unflatten(2, (tiles, group_size)), token.unflatten(2, (tiles, group_size))


def continue_tiles(
    tiles: tuple[Tensor, Tensor, Tensor], token: Tensor, target: Tensor, has: Entries, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Words, scales and zeros of tiles of values of tokens [B, K, n, G], up to `target` [B, K].

    A tile that was begun keeps what it has.
    """
    codes, scale, zero = tiles
    planes = Planes(bits, has.v_residual.shape[3], token.shape[-1])
    b, h = rows_and_heads(token, 1)
    tile = (token[..., 0] // token.shape[-1]).clamp(max=has.v_scales.shape[2] - 1)
    begun = (token < has.v_quantized[..., None, None])[..., None]
    codes = torch.where(begun, planes.unpack(has.v_codes[b, h, tile]), codes)
    codes = codes.masked_fill((token >= target[..., None, None])[..., None], 0)
    scale = torch.where(begun, has.v_scales[b, h, tile], scale)
    zero = torch.where(begun, has.v_zeros[b, h, tile], zero)
    return planes.pack(codes), scale, zero


def write_tiles(
    token: Tensor, target: Tensor, buffers: tuple[Tensor, ...], tiles: tuple[Tensor, ...]
) -> None:
    """Write the tiles [B, K, n, ...] of tokens [B, K, n, G] that begin below target [B, K]."""
    first = token[..., 0]
    chosen = first < target[..., None]
    b, h = (index.expand_as(first)[chosen] for index in rows_and_heads(first, 1))
    tile = first[chosen] // token.shape[-1]
    for buffer, new in zip(buffers, tiles, strict=True):
        buffer[b, h, tile] = new[chosen]


def write_ring(
    x: Tensor, order: Tensor, recent: Tensor, length: Tensor, quantized: Tensor, total: Tensor
) -> None:
    """Write those new rows of x [B, K, S, D] that stay exact to their slots."""
    token = length.long()[..., None] + torch.arange(x.shape[2], device=x.device)
    stays = (token >= quantized[..., None]) & (token < total[..., None])
    b, h = (index.expand_as(token)[stays] for index in rows_and_heads(x, 1))
    recent[b, h, token[stays] % recent.shape[2]] = x[b, h, order[stays]].to(recent.dtype)


def oldest_tiles(
    recent: Tensor, quantized: Tensor, block: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """The oldest block of a ring as tiles [B, K, n, G, D], and the indices [B, K, n] they get."""
    token = quantized.long()[..., None] + torch.arange(block, device=recent.device)
    b, h = rows_and_heads(recent, 1)
    tiles = recent[b, h, token % recent.shape[2]].unflatten(2, (-1, group_size))
    return tiles, token[..., ::group_size] // group_size


def replace_tiles(
    full: Tensor, tile: Tensor, buffers: tuple[Tensor, ...], tiles: tuple[Tensor, ...]
) -> None:
    """Write tiles [B, K, n, ...] where `full` [B, K]; shapes do not depend on data."""
    b, h = rows_and_heads(tile, 1)
    for buffer, new in zip(buffers, tiles, strict=True):
        at = (b, h, tile.clamp(max=buffer.shape[2] - 1))
        chosen = full.reshape(*full.shape, *[1] * (new.dim() - 2))
        buffer.index_put_(at, torch.where(chosen, new, buffer[at]))


def replace_value(full: Tensor, has: Entries, v_bits: int, group_size: int, ring: int) -> None:
    """Quantize the oldest exact value where `full` [B, K]: it joins the words of its tile."""
    planes = Planes(v_bits, int(has.v_residual.shape[3]), group_size)
    b, h = rows_and_heads(has.v_residual, 0)
    token = has.v_quantized.long()
    groups = has.v_residual[b, h, token % ring].unflatten(-1, (-1, group_size))
    at = (b, h, (token // group_size).clamp(max=has.v_scales.shape[2] - 1), token % group_size)
    fresh = parameters(groups, v_bits, dim=-1)
    for buffer, new in zip((has.v_scales, has.v_zeros), fresh, strict=True):
        buffer.index_put_(at, torch.where(full[..., None], new.squeeze(-1), buffer[at]))
    # read back: compilers skip the rounding of what they need not store
    scale, zero = has.v_scales[at].unsqueeze(-1), has.v_zeros[at].unsqueeze(-1)
    codes = encode(groups, scale, zero, v_bits).flatten(-2)
    tile, inside = at[2:]
    at = (b, h, tile, inside % planes.rows)
    old = has.v_codes[at]
    shift = (inside // planes.rows * planes.planes * v_bits).to(torch.int32)[..., None]
    by_plane = codes.unflatten(-1, (planes.planes, planes.words)).unbind(-2)
    fields = torch.stack([code << (p * v_bits) for p, code in enumerate(by_plane)]).sum(0)
    # what lies above the field is garbage of later parts
    below = old.to(torch.int32) & ((1 << shift) - 1)
    new = as_word(below | (fields.to(torch.int32) << shift))
    has.v_codes.index_put_(at, torch.where(full[..., None], new, old))
    has.v_quantized.add_(full.to(has.v_quantized.dtype))


def sorted_entries(
    coded: Tensor, recent: Tensor, quantized: Tensor, length: Tensor, size: int
) -> Tensor:
    """Entries by position [B, K, size, D]: dequantized ones, then the ring's, then zeros."""
    token = torch.arange(size, device=recent.device)
    b, h = rows_and_heads(recent, 1)
    exact = recent[b, h, token % recent.shape[2]]
    exact = torch.where((token < length[..., None])[..., None], exact, 0.0)
    old = coded[:, :, token.clamp(max=coded.shape[2] - 1)].to(recent.dtype)
    return torch.where((token < quantized[..., None])[..., None], old, exact)
