"""The pass that introduces the KV cache: each attention becomes its plan's ops, per program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from kvfx.emit import Emitter, add_buffer_inputs, add_tokens_input
from kvfx.graph import Graph, Level, call, operand, replace
from kvfx.pass_manager import Pass, Statistics
from kvfx.plan import Plan
from kvfx.provenance import Stamp, origin
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


@dataclass(frozen=True)
class InsertCache(Pass):
    """Rewrite each attention into the ops of one program, on the buffers of its site.

    Before:   o = kvfx.attention(q, k, v, None, position_ids)
    prefill:  o = kvfx.attend_prompt(q, k, v, position_ids)
              keep = kvfx.select(kvfx.score(q, k, v), ...);  k, v = kvfx.merge(k, v, keep, ...)
              kvfx.store(k, v, keep, *buffers)
    extend:   o = kvfx.extend(q, k, v, position_ids, *buffers);  kvfx.store(k, v, live, *buffers)
    decode:   kvfx.append(k, v, live, *buffers);  o = kvfx.attend(q, position_ids, *buffers)
    compact:  (the model is gone)  kvfx.flush(*buffers),  or select, kvfx.compact(keep, *buffers),
              or load, select, merge, zero the counters, store
    """

    plan: Plan
    program: str
    name: ClassVar[str] = "insert-cache"
    consumes: ClassVar[Level] = Level.RAISED
    produces: ClassVar[Level] = Level.CACHED

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Add the buffers as inputs and rewrite every site."""
        graph.program = self.program
        if self.program == "compact":
            _drop_model(graph)
        else:
            _hide_padding(graph)
        selects = self.plan.selects and self.program in ("prefill", "compact")
        tokens = add_tokens_input(graph) if selects else None
        attentions, known = _attentions(graph), {}
        for site in self.plan.sites:
            inputs = add_buffer_inputs(graph, site, known)
            emit = Emitter(graph, site, inputs, tokens, self.name)
            stats.hit(f"{self.program} {site.store.room}")
            if self.program == "compact":
                with graph.module.graph.inserting_before(_output(graph)):
                    _compact(emit)
                continue
            attention = attentions[site.site.name]
            with graph.module.graph.inserting_before(attention):
                if attention.args[3] is None:
                    out = PROGRAMS[self.program](emit, *(operand(attention, i) for i in range(3)))
                else:
                    out = _masked(emit, *(operand(attention, i) for i in range(4)))
            replace(attention, out)
        if self.program == "compact":
            for name in ("input_ids", "position_ids", "logits_index"):
                graph.module.graph.erase_node(graph.input(name))


def _prefill(emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    site, positions = emit.plan.site, emit.position_ids
    out = emit.op("attend_prompt", q, k, v, positions, scale=site.scale, window=site.window)
    rows = Rows(k, v, emit.live(), q, {})
    chosen = compress_rows(emit, rows)
    numbers = numbers_of(emit, rows, chosen)
    k, v = merge_rows(emit, rows, chosen)
    k = rotate_to_entries(emit, (k,), chosen.keep, positions, None)[0]
    _store(emit, k, v, chosen.keep, numbers)
    return out


def _extend(emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
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


def _decode(emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
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


def _masked(emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node) -> fx.Node:
    scale = emit.plan.site.scale
    out = emit.op("attend_masked", q, k, v, mask, *emit.buffers, scale=scale)
    emit.room("store", k, v, emit.live())
    return out


def _compact(emit: Emitter) -> None:
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
    return attention_of(emit, Rows(every[0], every[1], every[2], q, {}))


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
    "prefill": _prefill,
    "extend": _extend,
    "decode": _decode,
}


def _attentions(graph: Graph) -> dict[str, fx.Node]:
    """The raised attention nodes by the name of their site."""
    nodes = graph.calls(torch.ops.kvfx.attention.default)
    return {mark.site: node for node in nodes if (mark := origin(node)) is not None}


def _hide_padding(graph: Graph) -> None:
    """Show position 0 to the model where kvfx sees -1: its embeddings know no padding."""
    position_ids = graph.input("position_ids")
    attends = set(_attentions(graph).values())
    users = [user for user in position_ids.users if user not in attends]
    users = [user for user in users if user.target is not aten.sym_size.int]
    if not users:
        return
    first = next(node for node in graph.nodes if node.op == "call_function")
    with graph.module.graph.inserting_before(first):
        mark = Stamp("", "hide-padding", InsertCache.name)
        clamped = call(graph, aten.clamp_min.default, (position_ids, 0), mark)
    for user in users:
        user.replace_input_with(position_ids, clamped)


def _drop_model(graph: Graph) -> None:
    """Keep the inputs but none of the model: compact works on buffers alone."""
    _output(graph).args = ((),)
    for node in reversed(graph.nodes):
        if node.op not in ("output", "placeholder"):
            graph.module.graph.erase_node(node)


def _output(graph: Graph) -> fx.Node:
    return next(node for node in reversed(graph.module.graph.nodes) if node.op == "output")
