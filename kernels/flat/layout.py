"""Where entries lie: the heads of one row of the batch share its slots, each with room to grow.

`start` [B, K] is the first slot of each head, `length` [B, K] its live entries; head h owns the
slots up to `start` of h + 1, the last one those up to N. The first head starts at slot 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfx.kernels.common.rows import kept_first


class Layout(NamedTuple):
    """Where the entry of each slot [B, N] comes from (-1: the slot is free), and the new `start`
    and `length` [B, K].
    """

    source: Tensor
    start: Tensor
    length: Tensor


def owners(start: Tensor, length: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whose each slot is, its index there, and whether an entry lives in it: three times [B, N]."""
    slot = torch.arange(slots, device=start.device)
    head = (slot >= start[..., None]).sum(1) - 1
    index = slot - start.long().gather(1, head)
    return head, index, index < length.gather(1, head)


def spread(count: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Start and length of heads of `count` [B, K] entries in `slots` slots; what is free is shared
    out equally. Entries that do not fit are left out.
    """
    room = (slots - count.sum(1, keepdim=True)).clamp(min=0) // count.shape[1]
    start = ((count + room).cumsum(1) - count - room).clamp(max=slots)
    return start, torch.minimum(count, slots - start)


def layout(keep: Tensor, start: Tensor, length: Tensor, slots: int) -> Layout:
    """Lay out anew, with the kept rows, keep [B, K, S] bool, behind the live entries of their head.

    A source below `slots` is an old slot, one from there on is `slots + head * S + row`.
    """
    order, count = kept_first(keep)
    begin, total = spread(length + count, slots)
    head, index, live = owners(begin, total, slots)
    rows = keep.shape[2]
    behind = index - length.gather(1, head)
    row = order.flatten(1).gather(1, head * rows + behind.clamp(0, rows - 1))
    old = start.gather(1, head) + index
    source = torch.where(behind < 0, old, slots + head * rows + row)
    return Layout(source.masked_fill(~live, -1), begin, total)


def closed(keep: Tensor, start: Tensor, length: Tensor) -> tuple[Layout, Tensor]:
    """Lay out anew, with only the kept ones of the live entries, keep [B, K, N] bool; and how far
    the entry of each slot moves within its head: [B, N], zero where the slot is free.
    """
    slots = keep.shape[2]
    keep = keep & (torch.arange(slots, device=keep.device) < length[..., None])
    order, count = kept_first(keep)
    begin, total = spread(count, slots)
    head, index, live = owners(begin, total, slots)
    before = order.flatten(1).gather(1, head * slots + index)
    source = (start.gather(1, head) + before).masked_fill(~live, -1)
    return Layout(source, begin, total), (index - before).masked_fill(~live, 0)


def take(x: Tensor, source: Tensor) -> Tensor:
    """Rows of x [B, T, ...] at source [B, N]; zeros where it is negative."""
    b = torch.arange(x.shape[0], device=x.device)[:, None]
    dead = (source < 0).reshape(*source.shape, *(1,) * (x.dim() - 2))
    return x[b, source.clamp(min=0)].masked_fill_(dead, 0)


def rectangle(x: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """The slots x [B, N, ...] head by head: [B, K, N, ...], zero beyond the live length."""
    index = torch.arange(x.shape[1], device=x.device)
    slot = (start.long()[..., None] + index).masked_fill(index >= length[..., None], -1)
    return take(x, slot.flatten(1)).unflatten(1, slot.shape[1:])


def next_slots(keep: Tensor, start: Tensor, length: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The slot behind the live entries of each head, and whether one row is written there, keep [B,
    K, 1]: it is kept, and the slot is the head's own. Both are [B, K].
    """
    slot = start.long() + length
    return slot, keep[..., 0] & (slot < F.pad(start[:, 1:], (0, 1), value=slots))


def put(x: Tensor, rows: Tensor, slot: Tensor, writes: Tensor) -> None:
    """Write rows [B, K, ...] to their slot [B, K] of x [B, N, ...] where `writes` [B, K]."""
    b = torch.arange(x.shape[0], device=x.device)[:, None]
    # heads that write nothing repeat what another one writes: no slot gets two different rows
    other = writes.to(torch.uint8).argmax(1, keepdim=True)
    head = torch.where(writes, torch.arange(slot.shape[1], device=x.device), other)
    slot = slot.gather(1, head).clamp(max=x.shape[1] - 1)
    some = writes.any(1).reshape(-1, *(1,) * (rows.dim() - 1))
    x.index_put_((b, slot), torch.where(some, rows[b, head].to(x.dtype), x[b, slot]))


def resized(start: Tensor, length: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Where the entry of each of `slots` slots [B, N] comes from (-1: the slot is free) when a
    buffer changes its size, and the new `start` [B, K].
    """
    begin, total = spread(length, slots)
    head, index, live = owners(begin, total, slots)
    return (start.gather(1, head) + index).masked_fill(~live, -1), begin.to(start.dtype)
