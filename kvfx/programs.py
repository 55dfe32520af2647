"""What each program does at one site: the ops of the store's room around the stages of a policy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from kvfx.emit import Emitter
from kvfx.stages import (
    Rows,
    attention_of,
    compress_rows,
    merge_rows,
    moves_keys,
    numbers_of,
    rotate_to_entries,
)

aten = torch.ops.aten


def prefill(emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """A prompt's attention; then what stays of its rows is stored."""
    site, positions = emit.plan.site, emit.position_ids
    out = emit.op("attend_prompt", q, k, v, positions, scale=site.scale, window=site.window)
    rows = Rows(k, v, emit.live(), q, {})
    chosen = compress_rows(emit, rows)
    numbers = numbers_of(emit, rows, chosen)
    k, v = merge_rows(emit, rows, chosen)
    k = rotate_to_entries(emit, (k,), chosen.keep, positions, None)[0]
    _store(emit, k, v, chosen.keep, numbers)
    return out


def extend(emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """The attention of several rows over the cache and themselves; then they are stored."""
    live = emit.live()
    q, k = rotate_to_entries(emit, (q, k), live, emit.position_ids, emit.length)
    site = emit.plan.site
    out = emit.room("extend", q, k, v, emit.position_ids, scale=site.scale, **_bias(emit))
    if "score" in emit.plan.numbers:
        emit.write("extend", "score", _turn_scores(emit, q, k, v, live), live)
    if "position" in emit.plan.numbers:
        place = emit.op("position_rows", emit.position_ids, kv_heads=site.kv_heads)
        emit.write("store", "position", place, live)
    emit.room("store", k, v, emit.rows(live))
    return out


def decode(emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """One row is stored and attends to the cache."""
    live, site, attention = emit.live(), emit.plan.site, emit.plan.attention
    q, k = rotate_to_entries(emit, (q, k), live, emit.position_ids, emit.length)
    if "position" in emit.plan.numbers:
        place = emit.op("position_rows", emit.position_ids, kv_heads=site.kv_heads)
        emit.write("append", "position", place, live)
    emit.room("append", k, v, emit.rows(live))
    if attention is None:
        return emit.room("attend", q, emit.position_ids, scale=site.scale, **_bias(emit))
    score, decay = emit.inputs["score"], attention.decay
    return emit.room(
        "attend_scored",
        q,
        emit.position_ids,
        score,
        scale=site.scale,
        decay=decay,
        **_bias(emit),
    )


def masked(emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node) -> fx.Node:
    """Attention under the model's own mask; then the rows are stored."""
    scale = emit.plan.site.scale
    out = emit.op("attend_masked", q, k, v, mask, *emit.buffers, scale=scale)
    emit.room("store", k, v, emit.live())
    return out


def compact(emit: Emitter) -> None:
    """Flush what is due, or evict and merge entries."""
    store, select, merge = emit.plan.store, emit.plan.select, emit.plan.merge
    if select is None:
        if store.flushes:
            emit.room("flush")
        return
    in_place = store.compacts and merge is None
    rows = _held_rows(emit, in_place=in_place)
    chosen = compress_rows(emit, rows, interval=select.interval)
    if in_place:
        starts = emit.counts if store.ragged else ()
        for name in emit.plan.numbers:
            emit.op(f"compact_entries{emit.suffix}", chosen.keep, *starts, emit.inputs[name])
        rope = emit.plan.site.rope if moves_keys(emit) else None
        angles = None if rope is None else emit.frequencies()
        emit.room("compact", chosen.keep, angles, style="half" if rope is None else rope.style)
        return
    numbers = numbers_of(emit, rows, chosen)
    k, v = merge_rows(emit, rows, chosen)
    k = rotate_to_entries(emit, (k,), chosen.keep, None, None)[0]
    for name, buffer in emit.plan.buffers.items():
        if buffer.counter or name in numbers:
            emit.call(aten.zero_.default, emit.inputs[name])
    _store(emit, k, v, chosen.keep, numbers)


def _held_rows(emit: Emitter, *, in_place: bool) -> Rows:
    """The entries of the cache as rows [B, K, C, D] with the numbers beside them."""
    store, select = emit.plan.store, emit.plan.select
    numbers = {name: _number(emit, name, in_place=in_place) for name in emit.plan.numbers}
    if store.ragged and in_place and select is not None and select.decay is not None:
        # keys are not looked at: no rectangular copy of them
        live = emit.op("live_entries_flat", emit.inputs["k_flat"], *emit.counts)
        return Rows(None, None, live, None, numbers)
    if in_place and not store.ragged:
        k, v = emit.inputs["k_cache"], emit.inputs["v_cache"]
        return Rows(k, v, emit.op("live_entries", k, emit.length), None, numbers)
    loaded = emit.room("load")
    k, v, live = (emit.item(loaded, index) for index in range(3))
    return Rows(k, v, live, None, numbers)


def _number(emit: Emitter, name: str, *, in_place: bool) -> fx.Node:
    """Numbers beside entries as [B, K, C]; a copy where the buffer is about to be rewritten."""
    if emit.plan.store.ragged:
        return emit.op("load_entries_flat", emit.inputs[name], *emit.counts)
    number = emit.inputs[name]
    return number if in_place else emit.call(aten.clone.default, number)


def _turn_scores(emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node, live: fx.Node) -> fx.Node:
    """The attention that the rows of a turn give to all entries and to themselves."""
    loaded = emit.room("load")
    every = [
        emit.call(aten.cat.default, [emit.item(loaded, index), new], 2)
        for index, new in enumerate((k, v, live))
    ]
    score = attention_of(emit, Rows(every[0], every[1], every[2], q, {}))
    assert score is not None
    return score


def _store(
    emit: Emitter, k: fx.Node, v: fx.Node, keep: fx.Node, numbers: dict[str, fx.Node]
) -> None:
    """Write chosen rows and what is known about them."""
    for name, number in numbers.items():
        emit.write("store", name, number, keep)
    emit.room("store", k, v, emit.rows(keep))


def _bias(emit: Emitter) -> dict[str, fx.Node]:
    """What is added to scores: the log of the tokens that an entry stands for."""
    merge = emit.plan.merge
    return {"bias": emit.inputs["votes"]} if merge is not None and merge.votes else {}


PROGRAMS: dict[str, Callable[[Emitter, fx.Node, fx.Node, fx.Node], fx.Node]] = {
    "prefill": prefill,
    "extend": extend,
    "decode": decode,
}
