"""KVCrush: a part of what a policy keeps goes to representatives of what it drops.

Every row has a vector of bits, one per KV head: does the head rank it high? Rows are sorted by the
Hamming distance to one anchor, and representatives are taken evenly along that order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.kernels.crush.split import evictable, fixed_anchor, picked_ranks, representatives


def refine(
    score: Tensor,
    keep: Tensor,
    live: Tensor,
    position: Tensor | None,
    *,
    sinks: int,
    recent: int,
    share: float,
    ratio: float,
    anchor: str,
    bits: str,
    pick: str,
    page: int,
    seed: int,
) -> Tensor:
    """As many rows as `keep` [B, K, T] has: protected and best ones of it, and representatives.

    `position` [B, K, T] says which token a row is where heads hold different ones, else a row is
    the same token in all. Rows are chosen in pages of `page`; a head that elects none stays as is.
    """
    assert bits in ("half", "keepset"), bits
    pool = evictable(keep, live, sinks, recent, share)
    kept = keep & pool
    elected = representatives(kept.sum(-1), ratio) // page
    important = kept.sum(-1) // page - elected

    # pages [B, K, P, page] of rows of the pool
    rows = page_rows(pool, page)
    whole = pool.gather(-1, rows.flatten(2)).view_as(rows).all(-1)
    touched = whole & kept.gather(-1, rows.flatten(2)).view_as(rows).any(-1)
    value = score.float().gather(-1, rows.flatten(2)).view_as(rows).sum(-1)
    best = touched & (places(value, touched) < important[..., None])
    candidates = whole & ~best

    marks = token_bits(score, pool) if bits == "half" else keep
    vectors = page_vectors(seen_bits(marks, live, position), rows)
    distance = distances(vectors, anchor_bits(vectors, candidates, anchor, seed))
    pages = best | spread(distance, candidates, elected, pick)

    chosen = torch.zeros_like(keep).scatter(
        -1, rows.flatten(2), pages[..., None].expand_as(rows).flatten(2)
    )
    if page > 1:
        # a count that is not a multiple of the page is filled with single rows
        spare, missing = kept & ~chosen, kept.sum(-1) - chosen.sum(-1)
        chosen = chosen | (spare & (places(score, spare) < missing[..., None]))
    return torch.where((elected > 0)[..., None], (keep & ~pool) | chosen, keep)


def token_bits(score: Tensor, pool: Tensor) -> Tensor:
    """Whether a row is in the better half of its head's pool, [B, K, T] bool."""
    return pool & (places(score, pool) < (pool.sum(-1) // 2)[..., None])


def seen_bits(marks: Tensor, live: Tensor, position: Tensor | None) -> Tensor:
    """The bits of every head for the rows of each, [B, K, T, K]: 0 where a head does not hold the
    token.
    """
    batch, kv_heads, rows = marks.shape
    if position is None:
        return marks.transpose(1, 2)[:, None].expand(-1, kv_heads, -1, -1)
    # rows that are not live repeat the one before: sorted, and found after it
    held = position.masked_fill(~live, -1).cummax(-1).values
    wanted = position[:, None].expand(-1, kv_heads, -1, -1).flatten(2)
    at = torch.searchsorted(held, wanted.contiguous()).clamp(max=rows - 1)
    found = marks.gather(-1, at) & (held.gather(-1, at) == wanted)
    return found.view(batch, kv_heads, kv_heads, rows).permute(0, 2, 3, 1)


def page_rows(pool: Tensor, page: int) -> Tensor:
    """The rows of pages [B, K, P, page]: neighbours in the pool, whose rows come first; every row
    where a page is one.
    """
    if page == 1:
        return torch.arange(pool.shape[-1], device=pool.device)[:, None].expand(*pool.shape, 1)
    pages = pool.shape[-1] // page
    order = pool.long().argsort(dim=-1, descending=True, stable=True)
    return order[..., : pages * page].unflatten(-1, (pages, page))


def page_vectors(seen: Tensor, rows: Tensor) -> Tensor:
    """Bits of pages [B, K, P, page, K], from those of rows [B, K, T, K]."""
    index = rows.flatten(2)[..., None].expand(-1, -1, -1, seen.shape[-1])
    return seen.gather(2, index).view(*rows.shape, seen.shape[-1])


def anchor_bits(vectors: Tensor, among: Tensor, kind: str, seed: int) -> Tensor:
    """What vectors [B, K, P, page, K] are compared with, [page, K] or, per head, [B, K, page, K].

    "mean" is the strict majority of each bit over the pages in `among` [B, K, P].
    """
    if kind == "mean":
        votes = (vectors & among[..., None, None]).sum(2)
        return 2 * votes > among.sum(-1)[..., None, None]
    page, kv_heads = vectors.shape[3:]
    return fixed_anchor(kind, page * kv_heads, seed, vectors.device).view(page, kv_heads)


def distances(vectors: Tensor, anchor: Tensor) -> Tensor:
    """Hamming distances of vectors [B, K, P, page, K] to their anchor, [B, K, P]."""
    return (vectors != anchor[..., None, :, :]).sum((-2, -1))


def spread(distance: Tensor, candidates: Tensor, elected: Tensor, pick: str) -> Tensor:
    """As many of the candidates [B, K, P] as `elected` [B, K] says, evenly along the distance."""
    far = torch.iinfo(distance.dtype).max
    order = distance.masked_fill(~candidates, far).argsort(dim=-1, stable=True)
    taken = picked_ranks(candidates.sum(-1), elected, order.shape[-1], pick)
    return torch.zeros_like(candidates).scatter(-1, order, taken)


def places(score: Tensor, among: Tensor) -> Tensor:
    """The place of each row of `among` by score, from 0: ties by index, NaN as the smallest."""
    ranked = score.float().masked_fill(score.isnan(), float("-inf"))
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    place = among.gather(-1, order).cumsum(-1) - 1
    return torch.empty_like(order).scatter_(-1, order, place)
