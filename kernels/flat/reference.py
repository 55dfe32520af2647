"""Heads that keep different numbers of entries, one behind the other in one buffer.

`k_flat` and `v_flat` are [B, N, D]: the slots of one row of the batch, for all of its KV heads. A
head's entries are sorted by position, and lie in `length` [B, K] int32 slots from `start` [B, K]
int32 on; those between it and the next head are free, and hold garbage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfx.kernels.common.attention import Rules, attend_rows, inside
from kvfx.kernels.common.rotation import rotate
from kvfx.kernels.flat.layout import closed, layout, next_slots, owners, put, rectangle, take
from kvfx.kernels.flat.segments import softmax


def store(
    k: Tensor, v: Tensor, keep: Tensor, k_flat: Tensor, v_flat: Tensor, start: Tensor,
    length: Tensor,
) -> None:  # fmt: skip
    """Lay out anew, with the kept rows of k, v [B, K, S, D] behind the live entries; keep is [B, K,
    S] bool.
    """
    slots, rows = k_flat.shape[1], keep.shape[2]
    new = layout(keep, start, length, slots)
    b, slot = (new.source >= slots).nonzero(as_tuple=True)
    row = new.source[b, slot] - slots
    for flat, given in ((k_flat, k), (v_flat, v)):
        flat.copy_(take(flat, new.source.masked_fill(new.source >= slots, -1)))
        flat[b, slot] = given[b, row // rows, row % rows]
    start.copy_(new.start)
    length.copy_(new.length)


def append(
    k: Tensor, v: Tensor, keep: Tensor, k_flat: Tensor, v_flat: Tensor, start: Tensor,
    length: Tensor,
) -> None:  # fmt: skip
    """Write one row k, v [B, K, 1, D] behind the live entries of each head that keeps it and has
    room.
    """
    slot, writes = next_slots(keep, start, length, k_flat.shape[1])
    put(k_flat, k[:, :, 0], slot, writes)
    put(v_flat, v[:, :, 0], slot, writes)
    length.add_(writes.to(length.dtype))


def attend(
    q: Tensor, position_ids: Tensor, k_flat: Tensor, v_flat: Tensor, start: Tensor, length: Tensor,
    position: Tensor | None = None, bias: Tensor | None = None, slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *, scale: float, softcap: float = 0.0, window: int | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one row q [B, H, 1, D] over the live entries of its KV head: [B, H, 1, Dv].

    Entries are at `position` [B, N] (None: at their index in their head) and carry `bias` [B, N];
    the others are `Rules`.
    """
    rules = Rules(slopes, sinks, softcap, window, chunk)
    return _weighed(q, position_ids, k_flat, v_flat, start, length, position, bias, scale, rules)[0]


def attend_scored(
    q: Tensor, position_ids: Tensor, score: Tensor, k_flat: Tensor, v_flat: Tensor, start: Tensor,
    length: Tensor, position: Tensor | None = None, bias: Tensor | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, decay: float = 1.0, softcap: float = 0.0, window: int | None = None,
    chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """What `attend` returns; score [B, N] fp32 becomes `decay` times itself plus the weights that
    the entries get, summed over the query heads of their KV head.
    """
    rules = Rules(slopes, sinks, softcap, window, chunk)
    out, weight = _weighed(
        q, position_ids, k_flat, v_flat, start, length, position, bias, scale, rules
    )  # fmt: skip
    score.copy_(score * decay + weight.sum(1))
    return out


def _weighed(
    q: Tensor, position_ids: Tensor, k_flat: Tensor, v_flat: Tensor, start: Tensor, length: Tensor,
    position: Tensor | None, bias: Tensor | None, scale: float, rules: Rules,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The attention of one row and its weights [B, H / K, N]: every slot meets the query heads of
    its own KV head alone.
    """
    (batch, kv_heads), slots = start.shape, k_flat.shape[1]
    head, index, live = owners(start, length, slots)
    held = index if position is None else position.long()
    if rules.positioned or position is not None:
        live = live & inside(position_ids, held, rules)
    b = torch.arange(batch, device=q.device)[:, None]
    q_heads = (q.float() * scale).reshape(batch, kv_heads, -1, q.shape[3]).unbind(2)
    k, v = k_flat.float(), v_flat.float().masked_fill(~live[..., None], 0.0)
    # one query head at a time: each pass is a plain reduction over contiguous channels
    score = torch.stack([(row[b, head] * k).sum(-1) for row in q_heads], 1)
    if rules.softcap:
        score = rules.softcap * torch.tanh(score / rules.softcap)
    if rules.slopes is not None:
        slopes = rules.slopes.to(score.dtype).reshape(kv_heads, -1)[head].transpose(1, 2)
        score = score - slopes * (position_ids - held)[:, None]
    if bias is not None:
        score = score + bias[:, None]
    weight = softmax(score.masked_fill(~live[:, None], float("-inf")), head, kv_heads, rules.sinks)
    whose = head[..., None].expand_as(v)
    empty = v.new_zeros(batch, kv_heads, v.shape[2])
    out = [empty.scatter_add(1, whose, row[..., None] * v) for row in weight.unbind(1)]
    return torch.stack(out, 2).flatten(1, 2)[:, :, None].to(q.dtype), weight


def extend(
    q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, k_flat: Tensor, v_flat: Tensor,
    start: Tensor, length: Tensor, position: Tensor | None = None, bias: Tensor | None = None,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
    *, scale: float, softcap: float = 0.0, window: int | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of S rows over the live entries and over themselves, before they are stored: [B, H,
    S, Dv]. The optional operands are those of `attend`.
    """
    rules = Rules(slopes, sinks, softcap, window, chunk)
    k_past, v_past, live = load(k_flat, v_flat, start, length)
    held = position if position is None else rectangle(position.long(), start, length)
    if rules.positioned and position is None:
        held = torch.arange(k_flat.shape[1], device=q.device).expand(q.shape[0], 1, -1)
    bias = bias if bias is None else rectangle(bias, start, length)
    return attend_rows(q, k, v, position_ids, k_past, v_past, live, scale, rules, held, bias)


def load(
    k_flat: Tensor, v_flat: Tensor, start: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of the entries, k and v [B, K, N, D], and which of them are live [B, K, N] bool."""
    k, v = (rectangle(x, start, length) for x in (k_flat, v_flat))
    return k, v, live_entries(k_flat, start, length)


def live_entries(k_flat: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """Which entries of each head are live, where each had room for all slots: [B, K, N] bool."""
    del start
    return torch.arange(k_flat.shape[1], device=k_flat.device) < length[..., None]


def compact(
    keep: Tensor, frequencies: Tensor | None, k_flat: Tensor, v_flat: Tensor, start: Tensor,
    length: Tensor, *, style: str,
) -> None:  # fmt: skip
    """Lay out anew, with only the kept entries, keep [B, K, N] bool. With `frequencies` [W / 2],
    keys turn by how far they move in their head: `style` is that of the rope room.
    """
    new, shift = closed(keep, start, length)
    k = take(k_flat, new.source)
    if frequencies is not None:
        k = rotate(k[:, None], shift[:, None], frequencies, style)[:, 0]
    k_flat.copy_(k)
    v_flat.copy_(take(v_flat, new.source))
    start.copy_(new.start)
    length.copy_(new.length)


def load_entries(entries: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """The numbers of each head, entries [B, N] -> [B, K, N], zero beyond the live length."""
    return rectangle(entries, start, length)


def store_entries(x: Tensor, keep: Tensor, start: Tensor, length: Tensor, entries: Tensor) -> None:
    """Lay out entries [B, N] as `store` does afterwards, with the numbers x [B, K, S] of rows."""
    source = layout(keep, start, length, entries.shape[1]).source
    entries.copy_(take(torch.cat((entries, x.flatten(1).to(entries.dtype)), 1), source))


def extend_entries(x: Tensor, keep: Tensor, start: Tensor, length: Tensor, entries: Tensor) -> None:
    """Add the first N numbers of x [B, K, N + S] to what live entries have, and store the others,
    those of new rows.
    """
    slots = entries.shape[1]
    head, index, _ = owners(start, length, slots)
    # what free slots gain is gone when they are laid out anew
    entries.add_(x[..., :slots].flatten(1).gather(1, head * slots + index))
    store_entries(x[..., slots:], keep, start, length, entries)


def append_entries(x: Tensor, keep: Tensor, start: Tensor, length: Tensor, entries: Tensor) -> None:
    """Write one number x [B, K, 1] where `append` writes its row afterwards."""
    slot, writes = next_slots(keep, start, length, entries.shape[1])
    put(entries, x[..., 0], slot, writes)


def compact_entries(keep: Tensor, start: Tensor, length: Tensor, entries: Tensor) -> None:
    """Lay out entries [B, N] as `compact` does afterwards."""
    entries.copy_(take(entries, closed(keep, start, length)[0].source))
