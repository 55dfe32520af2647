"""What the definition and the kernels of this room share: how a choice is split, what is fixed."""

from __future__ import annotations

import torch
from torch import Tensor

# 1/3 of 6 is 2, however it is rounded
TOLERANCE = 1e-6
WORD = 0xFFFFFFFF


def evictable(keep: Tensor, live: Tensor, sinks: int, recent: int, share: float) -> Tensor:
    """Live rows [B, K, T] but the first `sinks` and the last `recent` and `share` of the kept."""
    rank = live.long().cumsum(-1)
    newest = live.sum(-1) - recent - torch.floor(keep.sum(-1).float() * share).long()
    return live & (rank > sinks) & (rank <= newest[..., None])


def representatives(entries: Tensor, ratio: float) -> Tensor:
    """How many of so many `entries` go to representatives: that `ratio`, rounded down."""
    return torch.floor(entries.double() * ratio + TOLERANCE).long()


def picked_ranks(candidates: Tensor, elected: Tensor, length: int, pick: str) -> Tensor:
    """Which of `length` ranks are taken, [..., length] bool: `elected` of the first `candidates`.

    "linspace" goes from the first to the last of them, "stride" starts at 0 in equal steps.
    """
    assert pick in ("linspace", "stride"), pick
    nth = torch.arange(length, device=candidates.device)
    elected, candidates = elected[..., None], candidates[..., None]
    if pick == "linspace":
        rank = nth * (candidates - 1) // (elected - 1).clamp(min=1)
    else:
        rank = nth * (candidates // elected.clamp(min=1))
    # one column more takes what is not elected
    rank = torch.where(nth < elected, rank, length)
    taken = torch.zeros(*rank.shape[:-1], length + 1, dtype=torch.bool, device=rank.device)
    return taken.scatter(-1, rank, True)[..., :length]


def fixed_anchor(kind: str, length: int, seed: int, device: torch.device) -> Tensor:
    """Bits [length] of an anchor that no score decides: zeros, ones, 0 1 0 1, or random ones.

    A random bit is a hash of `seed` and its index: nothing else changes it.
    """
    index = torch.arange(length, device=device)
    if kind == "zeros":
        return index < 0
    if kind == "ones":
        return index >= 0
    if kind == "alternating":
        return index % 2 == 1
    assert kind == "random", kind
    mixed = (index + seed * 0x9E3779B1 % WORD) & WORD
    for factor in (0x21F0AAAD, 0x735A2D97):
        mixed = ((mixed ^ (mixed >> 16)) * factor) & WORD
    return (mixed >> 15) & 1 == 1
