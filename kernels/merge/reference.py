"""Merging: which rows one entry takes in (targets), and what becomes of their keys and values.

Rows are sorted by position; those that are live lie next to each other. A target [B, K, T] int64
names for every row the row whose entry takes it in: itself if it leads or stands alone, -1 if it is
dropped or not live. Keys and values are computed in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.kernels.common.rows import kept_first
from kvfx.kernels.merge.links import check_linkage, leaders, links, protection
from kvfx.kernels.merge.similarity import anchored, cosine, most_similar
from kvfx.kernels.merge.weights import ahead_shares, gauss, windowed

# rows that are compared with all others at once
BLOCK = 128


def sets(
    k: Tensor, score: Tensor, live: Tensor, count: Tensor, *, threshold: float | None, sinks: int,
    recent: float, heavy: float, linkage: str,
) -> Tensor:  # fmt: skip
    """KVMerger's sets: runs of rows whose neighbouring keys are similar, led by the row of largest
    score.

    With a threshold, rows join where the cosine is larger ("chain": of neighbours; "anchor": with
    the set's first key). Without one, exactly min(count [B, K], live rows) sets are left. Sinks,
    and these shares of recent rows and of rows of large score, stay alone as long as possible.
    """
    check_linkage(linkage, threshold)
    stage = protection(score, live, sinks, recent, heavy)
    if linkage == "anchor":
        assert threshold is not None
        return leaders(anchored(k, live & (stage == 0), threshold), score, live)
    similar = torch.zeros_like(score, dtype=torch.float32)
    similar[..., :-1] = cosine(k[:, :, :-1], k[:, :, 1:])
    return leaders(links(similar, stage, live, count, threshold), score, live)


def next_kept(keep: Tensor, live: Tensor) -> Tensor:
    """The nearest kept row at or after each live row, -1 where none follows: keep, live [B, K, T]
    bool -> int64.
    """
    rows = keep.shape[-1]
    index = torch.where(keep, torch.arange(rows, device=keep.device), rows)
    following = index.flip(-1).cummin(-1).values.flip(-1)
    return torch.where(live & (following < rows), following, -1)


def nearest(
    k: Tensor, keep: Tensor, live: Tensor, gate: Tensor, *, past: float, present: float
) -> Tensor:
    """D2O's targets: the kept row of most similar key, -1 where the cosine u is below the gate.

    gate [B, K] fp32 becomes past * gate + present * mean(u) first, over a head's evicted rows;
    mean(u) where it was NaN; it stays where nothing is evicted.
    """
    norm = torch.linalg.vector_norm(k.float(), dim=-1, keepdim=True)
    unit = k.float() / norm.clamp(min=torch.finfo(torch.float32).tiny)
    best = [most_similar(rows, unit, keep) for rows in unit.split(BLOCK, dim=2)]
    similar, found = (torch.cat(parts, -1) for parts in zip(*best, strict=True))
    evicted = live & ~keep & (similar > float("-inf"))
    # in fp64, the mean of equal numbers is that number
    number = evicted.sum(-1)
    mean = similar.double().masked_fill(~evicted, 0.0).sum(-1) / number
    mean = mean.float()
    moved = torch.where(gate.isnan(), mean, past * gate + present * mean)
    gate.copy_(torch.where(number > 0, moved, gate))
    target = torch.where(evicted & (similar >= gate[..., None]), found, -1)
    return torch.where(keep, torch.arange(keep.shape[-1], device=k.device), target)


def lead_rows(target: Tensor) -> Tensor:
    """The rows that are their own target: [B, K, T] bool."""
    return target == torch.arange(target.shape[-1], device=target.device)


def target_shift(target: Tensor, position: Tensor) -> Tensor:
    """How far each row is from its target's position, 0 where it has none: position [B, K, T]."""
    position = position.long()
    shift = position.gather(-1, target.clamp(min=0)) - position
    return torch.where(target >= 0, shift, 0)


def numbers(x: Tensor, target: Tensor) -> Tensor:
    """Sums of x [B, K, T] at targets, 0 elsewhere."""
    x = torch.where(target >= 0, x, 0)
    return torch.zeros_like(x).scatter_add(-1, target.clamp(min=0), x)


def votes(target: Tensor, votes: Tensor | None) -> Tensor:
    """The logarithm of how many tokens stand behind each target, 0 elsewhere: [B, K, T] fp32.

    votes [B, K, T] are the logarithms of the rows (None: every row stands for one token).
    """
    rows = torch.zeros_like(target, dtype=torch.float32) if votes is None else votes.float()
    at, rows = target.clamp(min=0), torch.where(target >= 0, rows, float("-inf"))
    most = torch.full_like(rows, float("-inf")).scatter_reduce(-1, at, rows, "amax")
    led = lead_rows(target)
    most = torch.where(led, most, 0.0)
    total = torch.zeros_like(rows).scatter_add(-1, at, torch.exp(rows - most.gather(-1, at)))
    return torch.where(led, most + torch.log(total), 0.0)


def gaussian(
    k: Tensor, v: Tensor, target: Tensor, votes: Tensor | None, *, sigma: str, width: float,
    scaled: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """KVMerger's merge: a target's key and value become means, weighed by exp(votes) and by a
    Gaussian of the distance between keys.

    `sigma` is how wide the Gaussian is ("fixed": `width`). With `scaled`, values are times the
    tokens of their set; those of rows that stood for more than one are so already.
    """
    distance = torch.linalg.vector_norm(k.float() - _led(k.float(), target), dim=-1)
    distance = torch.where(target >= 0, distance, 0.0)
    count = torch.ones_like(distance) if votes is None else torch.exp(votes.float())
    share = count * gauss(distance, lambda x: _set_sum(x, target), sigma, width)
    share = share / _set_sum(share, target)
    mixed = _mixed(v.float() / count[..., None] if scaled else v.float(), target, share)
    if scaled:
        several = _set_sum(torch.ones_like(count), target) > 1
        tokens = _set_sum(count, target)[..., None]
        mixed = torch.where((lead_rows(target) & several)[..., None], mixed * tokens, v.float())
    return _like(k, _mixed(k.float(), target, share)), _like(v, mixed)


def weighted(k: Tensor, v: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """WeightedKV's merge: a target's value becomes the mean of its rows by weight [B, K, T], as it
    was where no other row has any; keys stay.
    """
    weight = torch.where(weight > 0, weight.float(), 0.0)
    share = weight / _set_sum(weight, target)
    return k.clone(), _like(v, _mixed(v.float(), target, share))


def similar(k: Tensor, v: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """D2O's merge: rows weigh e^u, u the cosine with their target's key (1 for itself)."""
    u = torch.where(lead_rows(target), 1.0, cosine(k, _led(k, target)))
    weight = torch.exp(u)
    share = weight / _set_sum(weight, target)
    return tuple(_like(x, _mixed(x.float(), target, share)) for x in (k, v))  # type: ignore


def _led(x: Tensor, target: Tensor) -> Tensor:
    return x.gather(2, target.clamp(min=0)[..., None].expand_as(x))


def _set_sum(x: Tensor, target: Tensor) -> Tensor:
    return numbers(x, target).gather(-1, target.clamp(min=0))


def _mixed(x: Tensor, target: Tensor, share: Tensor) -> Tensor:
    """x with its targets moved towards their rows: what is equal stays exactly as it is."""
    counts = (target >= 0) & ~lead_rows(target) & (share > 0)
    change = torch.where(counts[..., None], share[..., None] * (x - _led(x, target)), 0.0)
    return x.scatter_add(2, target.clamp(min=0)[..., None].expand_as(x), change)


def _like(x: Tensor, out: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(out)


def ahead(
    k: Tensor, v: Tensor, keep: Tensor, live: Tensor, score: Tensor, position: Tensor | None, *,
    targets: int, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """CaM's merge: evicted values are added, in equal parts, to the next `targets` kept rows; keys
    stay.

    A row is merged with the probability min(1, its score / the mean score of its targets); the draw
    depends on seed, head and position [B, K, T] (None: rank among live rows). One shot: what is
    merged here is not merged onward with a target that is evicted itself.
    """
    order, kept = kept_first(keep)
    share, before = ahead_shares(keep, live, score, position, order, targets=targets, seed=seed)
    given = torch.where((share > 0)[..., None], share[..., None] * v.float(), 0.0)
    at = before[..., None].expand_as(v)
    received = windowed(torch.zeros_like(given).scatter_add(2, at, given), targets)
    beyond = torch.arange(keep.shape[-1], device=v.device) >= kept[..., None]
    received = received.masked_fill(beyond[..., None], 0.0)
    out = v.float().scatter_add(2, order[..., None].expand_as(v), received)
    return k.clone(), _like(v, out)
