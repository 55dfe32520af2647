"""What each program does at one site: the ops of the store's room around the stages of a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx
from torch.fx.node import Argument

from kvfx.absorb import absorbed
from kvfx.emit import Emitter
from kvfx.rebuild import latent_rows, rebuilt
from kvfx.stages import (
    Chosen,
    Rows,
    allocate,
    attention_of,
    compress_rows,
    merge_rows,
    moves_keys,
    numbers_of,
    observe,
    ranks_of,
    rotate_to_entries,
)

aten = torch.ops.aten


def prefill(emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """A prompt's attention; then what stays of its rows is stored."""
    out, positions = _attend_prompt(emit, q, k, v), emit.position_ids
    rows = Rows(k, v, emit.live(), q, {})
    if emit.plan.allocate is None:
        chosen = compress_rows(emit, rows)
    else:
        # until all layers are known, everything stays: see `allocate_layers`
        observe(emit, rows)
        chosen = Chosen(rows.live, attention_of(emit, rows), None, None)
    numbers = numbers_of(emit, rows, chosen)
    if emit.plan.allocate is None:
        k, v = merge_rows(emit, rows, chosen)
    k = rotate_to_entries(emit, (k,), chosen.keep, positions, None)[0]
    _store(emit, k, v, chosen.keep, numbers)
    return out


def allocate_layers(emits: Sequence[Emitter]) -> None:
    """At the end of a prompt: divide the budget among layers by the scores of all of them, and
    compress each.
    """
    first = emits[0]
    allocation, select, site = first.plan.allocate, first.plan.select, first.plan.site
    assert allocation is not None
    assert select is not None
    every = [_held_rows(emit, in_place=_in_place(emit)) for emit in emits]
    ranks = [
        emit.call(aten.mean.dim, ranks_of(emit, rows, attention_of(emit, rows)), [1])
        for emit, rows in zip(emits, every, strict=True)
    ]
    score = first.call(aten.stack.default, ranks)
    live = first.call(aten.select.int, every[0].live, 1, 0)
    mean = first.call(aten.select.int, allocate(first, select), 1, 0)
    total = first.call(aten.mul.Tensor, mean, len(emits))
    attributes = allocation.allocate_attributes(select)
    counts = first.op(allocation.allocate, score, live, total, **attributes)
    for layer, (emit, rows) in enumerate(zip(emits, every, strict=True)):
        count = emit.call(aten.slice.Tensor, counts, 1, layer, layer + 1)
        count = emit.call(aten.expand.default, count, [-1, site.kv_heads])
        emit.call(aten.copy_.default, emit.inputs["allowed"], count)
        asked = emit.call(aten.unsqueeze.default, emit.tokens, 1)
        emit.call(aten.copy_.default, emit.inputs["asked"], asked)
        _rewrite(emit, rows, compress_rows(emit, rows, count=count))


def extend(emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """The attention of several rows over the cache and themselves; then they are stored, where
    other sites read them by `keep_rows`.
    """
    live = emit.live()
    q, k = rotate_to_entries(emit, (q, k), live, emit.position_ids, emit.length)
    site = emit.plan.site
    out = _attend(emit, "extend", q, k, v, emit.position_ids)
    if "score" in emit.plan.numbers:
        emit.write("extend", "score", _turn_scores(emit, q, k, v, live), live)
    if "position" in emit.plan.numbers:
        place = emit.op("position_rows", emit.position_ids, kv_heads=site.kv_heads)
        emit.write("store", "position", place, live)
    if not emit.shared:
        _write(emit, "store", k, v, live)
    return out


def keep_rows(emit: Emitter, k: fx.Node, v: fx.Node) -> None:
    """Store the rows of a turn, now that all sites that read them have attended."""
    _write(emit, "store", k, v, emit.live())


def read(emit: Emitter, program: str, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """The attention of a site whose keys and values another site has stored."""
    if program == "prefill":
        return _attend_prompt(emit, q, k, v)
    if program == "extend":
        return _attend(emit, "extend", q, k, v, emit.position_ids)
    return _attend(emit, "attend", q, emit.position_ids)


def decode(emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """One row is stored and attends to the cache."""
    live, site, attention = emit.live(), emit.plan.site, emit.plan.attention
    q, k = rotate_to_entries(emit, (q, k), live, emit.position_ids, emit.length)
    if "position" in emit.plan.numbers:
        place = emit.op("position_rows", emit.position_ids, kv_heads=site.kv_heads)
        emit.write("append", "position", place, live)
    _write(emit, "append", k, v, live)
    if attention is None:
        return _attend(emit, "attend", q, emit.position_ids)
    score, decay = emit.inputs["score"], attention.decay
    return emit.room(
        "attend_scored",
        q,
        emit.position_ids,
        score,
        scale=site.scale,
        decay=decay,
        **_rules(emit),
    )


def masked(emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node) -> fx.Node:
    """Attention under the model's own mask; then the rows are stored."""
    scale = emit.plan.site.scale
    out = emit.op("attend_masked", q, k, v, mask, *emit.buffers, scale=scale, **emit.rules())
    emit.room("store", k, v, emit.live())
    return out


def compact(emit: Emitter) -> None:
    """Flush what is due, or evict and merge entries."""
    select = emit.plan.select
    if select is not None:
        rows = _held_rows(emit, in_place=_in_place(emit))
        _rewrite(emit, rows, compress_rows(emit, rows, interval=select.interval))
    elif emit.plan.store.flushes:
        emit.room("flush")


def _in_place(emit: Emitter) -> bool:
    """Whether kept entries are moved together, and none of them is changed."""
    return emit.plan.store.compacts and emit.plan.merge is None


def _rewrite(emit: Emitter, rows: Rows, chosen: Chosen) -> None:
    """Leave only the chosen entries, with what they took in."""
    if _in_place(emit):
        starts = emit.counts if emit.plan.store.ragged else ()
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
    numbers = {}
    if "slopes" in emit.rules():
        known = [
            _number(emit, "position", in_place=True),
            emit.op("position_rows", emit.position_ids, kv_heads=emit.plan.site.kv_heads),
        ]
        numbers["position"] = emit.call(aten.cat.default, known, 2)
    score = attention_of(emit, Rows(every[0], every[1], every[2], q, numbers))
    assert score is not None
    return score


def _store(
    emit: Emitter, k: fx.Node, v: fx.Node, keep: fx.Node, numbers: dict[str, fx.Node]
) -> None:
    """Write chosen rows and what is known about them."""
    for name, number in numbers.items():
        emit.write("store", name, number, keep)
    _write(emit, "store", k, v, keep)


def _write(emit: Emitter, verb: str, k: fx.Node, v: fx.Node, keep: fx.Node) -> None:
    """Store or append rows: k and v, or what they are computed from."""
    rows = (latent_rows(emit),) if emit.plan.store.rebuilds else (k, v)
    emit.room(verb, *rows, emit.rows(keep))


def _attend_prompt(emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """The attention of a prompt over itself."""
    site = emit.plan.site
    sees = {"window": site.window, **emit.rules()}
    return emit.op("attend_prompt", q, k, v, emit.position_ids, scale=site.scale, **sees)


def _attend(emit: Emitter, verb: str, *rows: fx.Node) -> fx.Node:
    """The attention of rows over the cache, whose K and V may have to be computed again."""
    scale, rules = emit.plan.site.scale, _rules(emit)
    if not emit.plan.store.rebuilds:
        return emit.room(verb, *rows, scale=scale, **rules)
    if emit.plan.store.absorb and verb == "attend":
        return absorbed(emit, rows[0], rules)
    return emit.op(f"{verb}_dense", *rows, *rebuilt(emit), emit.length, scale=scale, **rules)


def _rules(emit: Emitter) -> dict[str, Argument]:
    """What attention over entries does besides scaled products: the model's rules, where it needs
    them the entries' positions, and the log of the tokens that an entry stands for.
    """
    merge, rules = emit.plan.merge, emit.rules()
    if emit.plan.site.slopes is not None and "position" in emit.plan.numbers:
        rules["position"] = emit.inputs["position"]
    if merge is not None and merge.votes:
        rules["bias"] = emit.inputs["votes"]
    return rules


PROGRAMS: dict[str, Callable[[Emitter, fx.Node, fx.Node, fx.Node], fx.Node]] = {
    "prefill": prefill,
    "extend": extend,
    "decode": decode,
}
