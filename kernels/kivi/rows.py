"""Moving rows between rings and tiles: gathers and scatters per row and KV head."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.kernels.kivi.layout import rows_and_heads


def pending(
    x: Tensor,
    order: Tensor,
    recent: Tensor,
    length: Tensor,
    quantized: Tensor,
    total: Tensor,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """Tiles [B, K, n, G, D] from the tile of the first exact token on, old rows and new ones x [B, K, S, D], and their tokens [B, K, n, G]."""
    start = quantized.long() // group_size * group_size
    tiles = -(-int((total - start).max()) // group_size)
    token = start[..., None] + torch.arange(tiles * group_size, device=x.device)
    new = (token - length[..., None]).clamp(0, max(x.shape[2] - 1, 0))
    b, h = rows_and_heads(x, 1)
    old = recent[b, h, token % recent.shape[2]]
    rows = torch.where(
        (token < length[..., None])[..., None], old, x[b, h, order.gather(-1, new)].to(recent.dtype)
    )
    return rows.unflatten(2, (tiles, group_size)), token.unflatten(2, (tiles, group_size))


def write_tiles(
    tile: Tensor, chosen: Tensor, buffers: tuple[Tensor, ...], tiles: tuple[Tensor, ...]
) -> None:
    """Write the chosen of `tiles` [B, K, n, ...] to their index `tile` [B, K, n] of each buffer."""
    b, h = (x.expand_as(tile)[chosen] for x in rows_and_heads(tile, 1))
    for buffer, x in zip(buffers, tiles, strict=True):
        buffer[b, h, tile[chosen]] = x[chosen]


def write_ring(
    x: Tensor, order: Tensor, recent: Tensor, length: Tensor, quantized: Tensor, total: Tensor
) -> None:
    """Write those new rows of x [B, K, S, D] that stay exact to their slots."""
    token = length.long()[..., None] + torch.arange(x.shape[2], device=x.device)
    stays = (token >= quantized[..., None]) & (token < total[..., None])
    b, h = (i.expand_as(token)[stays] for i in rows_and_heads(x, 1))
    recent[b, h, token[stays] % recent.shape[2]] = x[b, h, order[stays]].to(recent.dtype)


def oldest_tiles(
    recent: Tensor, quantized: Tensor, block: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """The oldest block of a ring as tiles [B, K, n, G, D], and the indices of the tiles [B, K, n] it becomes."""
    token = quantized.long()[..., None] + torch.arange(block, device=recent.device)
    b, h = rows_and_heads(recent, 1)
    tiles = recent[b, h, token % recent.shape[2]].unflatten(2, (-1, group_size))
    return tiles, token[..., ::group_size] // group_size


def replace_tiles(
    full: Tensor, tile: Tensor, buffers: tuple[Tensor, ...], tiles: tuple[Tensor, ...]
) -> None:
    """Write tiles [B, K, n, ...] where `full` [B, K], and what is there already elsewhere: shapes do not depend on data."""
    b, h = rows_and_heads(tile, 1)
    for buffer, new in zip(buffers, tiles, strict=True):
        at = (b, h, tile.clamp(max=buffer.shape[2] - 1))
        old = buffer[at]
        buffer.index_put_(
            at, torch.where(full.reshape(*full.shape, *[1] * (new.dim() - 2)), new, old)
        )


def sorted_entries(
    coded: Tensor, recent: Tensor, quantized: Tensor, length: Tensor, size: int
) -> Tensor:
    """Entries by position [B, K, size, D]: dequantized ones, then the ring's, then zeros."""
    token = torch.arange(size, device=recent.device)
    b, h = rows_and_heads(recent, 1)
    exact = recent[b, h, token % recent.shape[2]]
    exact = torch.where((token < length[..., None])[..., None], exact, 0.0)
    known = coded[:, :, token.clamp(max=coded.shape[2] - 1)].to(recent.dtype)
    return torch.where((token < quantized[..., None])[..., None], known, exact)
