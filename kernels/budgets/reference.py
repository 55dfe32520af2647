"""How many entries each layer of a row keeps, found on the device: numbers that are known only when
the prompt is.

Scores become whole numbers first: their sums are exact, so every device, batch and padding counts
alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# a largest share and a largest score as whole numbers: 2^24 entries and 2^18 rows fit in int64
SHARE, MASS = 1 << 24, 1 << 44


def share_entries(
    tokens: Tensor, kv_heads: int, fraction: float, entries: int, protected: int, least: int,
    shares: Sequence[float], layer: int,
) -> Tensor:  # fmt: skip
    """Entries that `layer` keeps per row and head, [B, K] int64: its part of what as many layers
    as there are `shares` keep under a uniform budget (`entries`, or that `fraction` of tokens [B]
    when it is 0).

    Every layer has its `protected` entries; shares divide the others, but no layer gets fewer than
    `least` or more than its tokens, or than a uniform budget where that is more. The sum over
    layers is that of uniform budgets, exactly.
    """
    layers = len(shares)
    wanted = (
        torch.full_like(tokens, entries)
        if entries
        else torch.ceil(tokens.double() * fraction).long()
    )
    each = wanted.clamp(min=least)
    most, held = torch.maximum(tokens, each), each.clamp(max=protected)
    bottom = (least - held).clamp(min=0)
    weights = torch.tensor(whole_shares(shares)).to(tokens.device, non_blocking=True)
    divided = apportion(
        (each - held) * layers,
        weights,
        bottom[:, None].expand(-1, layers),
        (most - held)[:, None].expand(-1, layers),
    )
    return (held + divided[:, layer])[:, None].repeat(1, kv_heads)


def allocate_again(allowed: Tensor, asked: Tensor, tokens: Tensor) -> Tensor:
    """Entries [B, K] that a longer conversation may keep where the first prompt, of asked [B, 1]
    tokens, allowed that many: in proportion to tokens [B], rounded to the nearest.
    """
    return (2 * allowed * tokens[:, None] + asked) // (2 * asked).clamp(min=1)


def whole_shares(shares: Sequence[float]) -> list[int]:
    """Shares as whole numbers, the largest as `SHARE`; none is zero, and all are alike where all
    are zero.
    """
    largest = max(shares)
    return [max(1, round(share / largest * SHARE)) if largest > 0 else 1 for share in shares]


def apportion(total: Tensor, weights: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """Whole numbers [B, L] from `least` to `most` [B, L] whose sum is total [B], as near as bounds
    allow: Webster's division by weights [L].

    The layer with the smallest (count + 1/2) / weight is the next to get an entry, equal ones in
    their order. A larger total therefore never takes an entry from a layer.
    """
    layers = weights.shape[0]
    ends = torch.cat([least / weights, most / weights], 1).sort(1).values
    filled = (ends[:, :, None] * weights).clamp(least[:, None], most[:, None]).sum(2)
    after = (filled < total[:, None]).sum(1, keepdim=True).clamp(1, 2 * layers - 1)
    low, high = (filled.gather(1, after - step) for step in (1, 0))
    start, end = (ends.gather(1, after - step) for step in (1, 0))
    # where exactly does not matter: what follows looks at all that rounding can move
    level = start + (end - start) * ((total[:, None] - low) / (high - low).clamp(min=1e-9))
    reach = layers // 2 + 2
    below = (torch.floor(level * weights).long() - reach).clamp(least, most)
    count = below[..., None] + torch.arange(2 * reach + 2, device=total.device)
    # exact ratios of small whole numbers: fp64 keeps their order, and equal ones equal
    turn = (2 * count + 1).double() / weights[:, None]
    turn = turn.masked_fill(count >= most[..., None], float("inf")).flatten(1)
    return below + _won(turn, total - below.sum(1)).unflatten(1, (layers, -1)).sum(2)


def allocate_prefix(
    score: Tensor, live: Tensor, total: Tensor, sinks: int, recent: int, share: float, least: int
) -> Tensor:
    """Entries that each layer of a row keeps, [B, L] int64, `total` [B] in all: layers keep an
    equal part of their score [L, B, T] (PrefixKV, exact).

    The first `sinks` live rows [B, T] stay in every layer, as do the newest `recent` and that
    `share` of an even budget; layers divide the score of the others. No layer keeps fewer than
    `least`. Where the total is too small for these, layers get as many. A layer without any score
    comes last. Negative scores count as none.
    """
    layers = score.shape[0]
    protected = _protected(live, total // layers, sinks, recent, share)
    mass = whole_mass(score, live & ~protected)
    # protected rows first
    ordered = mass.masked_fill(protected, MASS + 1).sort(-1, descending=True).values
    index = torch.arange(score.shape[2], device=score.device)
    held, rows = protected.sum(-1, keepdim=True), live.sum(-1, keepdim=True)
    ordered = torch.where(index < held, 0, ordered)
    retained = _retained_before(ordered)
    retained = torch.where((ordered.sum(-1, keepdim=True) == 0) & (index > held), 1.0, retained)
    retained = torch.where(index < held.clamp(min=least), -1.0, retained)
    retained = torch.where(index < rows, retained, float("inf"))
    # [B, T * L], the first rows of all layers first: layers that are alike get alike
    won = _won(retained.permute(1, 2, 0).flatten(1), total)
    return won.unflatten(1, (-1, layers)).sum(1)


def allocate_mass(
    score: Tensor, live: Tensor, threshold: float, sinks: int, recent: int, least: int
) -> Tensor:
    """Entries per row and head, [B, K] int64: the fewest that hold the part `threshold` of the
    score [B, K, T] summed over heads (ZipVL).

    The first `sinks` and last `recent` live rows are among them, and at least `least`. Heads of a
    row must be live alike, and get alike; a row without any score keeps all.
    """
    alive = live[:, 0]
    protected = _protected(alive, torch.zeros_like(alive.sum(-1)), sinks, recent, 0.0)
    mass = whole_mass(torch.where(live & (score > 0), score.double(), 0.0).sum(1), alive)
    ranked = (mass + 1).masked_fill(~alive, 0).masked_fill(protected, torch.iinfo(mass.dtype).max)
    ordered = mass.gather(1, ranked.argsort(-1, descending=True))
    rows = alive.sum(-1)
    index = torch.arange(ordered.shape[1], device=score.device)
    short = (_retained_before(ordered) < threshold) & (index < rows[:, None])
    bottom = protected.sum(-1).clamp(min=least)
    count = torch.minimum(torch.maximum(short.sum(-1), bottom), rows)
    return count[:, None].repeat(1, live.shape[1])


def allocate_dbudget(score: Tensor, live: Tensor, threshold: float, sinks: int) -> Tensor:
    """Entries per row and head, [B, K] int64: the first `sinks` live rows and so many of the newest
    that the norm of score [B, K, T] falls by less than the part `threshold` (DBudgetKV).

    A row without any score keeps all.
    """
    mass = whole_mass((score.double().clamp(min=0) / _largest(score, live)) ** 2, live)
    first = live & (live.long().cumsum(-1) <= sinks)
    held = torch.where(first, mass, 0)
    newest = (mass - held).flip(-1).cumsum(-1).flip(-1) + held.sum(-1, keepdim=True)
    reached = torch.where(first, held.cumsum(-1), newest)
    needed = mass.sum(-1, keepdim=True).double() * (1.0 - threshold) ** 2
    short = live & (reached.double() <= needed)
    rows = live.sum(-1)
    return torch.minimum(torch.maximum(short.sum(-1) + 1, rows.clamp(max=sinks)), rows)


def whole_mass(score: Tensor, live: Tensor) -> Tensor:
    """Scores [..., T] as whole numbers, the largest live one as `MASS`: NaN, negative scores and
    those of other rows as 0.
    """
    mass = torch.where(live & (score > 0), score.double(), 0.0)
    return torch.round(mass / _largest(score, live) * MASS).nan_to_num(MASS).long()


def _largest(score: Tensor, live: Tensor) -> Tensor:
    mass = torch.where(live & (score > 0), score.double(), 0.0)
    largest = mass.amax(-1, keepdim=True)
    return torch.where(largest > 0, largest, 1.0)


def _retained_before(ordered: Tensor) -> Tensor:
    """The part of the whole mass that stands before each entry: [..., T] int64 -> fp64."""
    seen = ordered.cumsum(-1)
    return (seen - ordered).double() / seen[..., -1:].clamp(min=1).double()


def _protected(live: Tensor, count: Tensor, sinks: int, recent: int, share: float) -> Tensor:
    """The first `sinks` live rows [B, T], and the newest `recent` plus that share of count [B]."""
    rank = live.long().cumsum(-1)
    newest = live.sum(-1) - recent - torch.floor(count.float() * share).long()
    return live & ((rank <= sinks) | (rank > newest[..., None]))


def _won(turn: Tensor, count: Tensor) -> Tensor:
    """Which count [B] of turn [B, N] come first, equal ones in their order; infinite ones never."""
    order = torch.argsort(turn, dim=1, stable=True)
    index = torch.arange(turn.shape[1], device=turn.device).expand_as(order)
    place = torch.empty_like(order).scatter_(1, order, index)
    return (place < count[:, None]) & turn.isfinite()
