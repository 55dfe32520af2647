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
from kvfx.stages import count_entries, rotate_to_entries, score_rows, select_rows

aten = torch.ops.aten


@dataclass(frozen=True)
class InsertCache(Pass):
    """Rewrite each attention into the ops of one program, on the buffers of its site.

    Before:   o = kvfx.attention(q, k, v, None, position_ids)
    prefill:  o = kvfx.attend_prompt(q, k, v, position_ids)
              keep = kvfx.select(kvfx.score(q, k, v), ...);  kvfx.store(k, v, keep, *buffers)
    extend:   o = kvfx.extend(q, k, v, position_ids, *buffers);  kvfx.store(k, v, live, *buffers)
    decode:   kvfx.append(k, v, live, *buffers);  o = kvfx.attend(q, position_ids, *buffers)
    compact:  (the model is gone)  kvfx.flush(*buffers),  or select, kvfx.compact(keep, *buffers),
              or load, select, zero the counters, store
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
    live = emit.live()
    score = score_rows(emit, q, k, v, live)
    keep = select_rows(emit, score, live, None if emit.plan.select is None else count_entries(emit))
    if "score" in emit.inputs:
        emit.op("store_entries", score, keep, emit.length, emit.inputs["score"])
    k = rotate_to_entries(emit, (k,), keep, positions, None)[0]
    emit.room("store", k, v, emit.rows(keep))
    return out


def _extend(emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    live = emit.live()
    q, k = rotate_to_entries(emit, (q, k), live, emit.position_ids, emit.length)
    out = emit.room("extend", q, k, v, emit.position_ids, scale=emit.plan.site.scale)
    if "score" in emit.inputs:
        loaded = emit.room("load")
        past = [emit.call(_item, loaded, index) for index in range(3)]
        every = [
            emit.call(aten.cat.default, [old, new], 2)
            for old, new in zip(past, (k, v, live), strict=True)
        ]
        score = score_rows(emit, q, *every)
        emit.op("extend_entries", score, live, emit.length, emit.inputs["score"])
    emit.room("store", k, v, emit.rows(live))
    return out


def _decode(emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    live = emit.live()
    q, k = rotate_to_entries(emit, (q, k), live, emit.position_ids, emit.length)
    emit.room("append", k, v, emit.rows(live))
    scale, select = emit.plan.site.scale, emit.plan.select
    if select is None or select.decay is None:
        return emit.room("attend", q, emit.position_ids, scale=scale)
    score = emit.inputs["score"]
    return emit.room("attend_scored", q, emit.position_ids, score, scale=scale, decay=select.decay)


def _masked(emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node) -> fx.Node:
    scale = emit.plan.site.scale
    out = emit.op("attend_masked", q, k, v, mask, *emit.buffers, scale=scale)
    emit.room("store", k, v, emit.live())
    return out


def _compact(emit: Emitter) -> None:
    if emit.plan.select is None:
        if emit.plan.store.flushes:
            emit.room("flush")
        return
    store, select = emit.plan.store, emit.plan.select
    if store.compacts:
        k, v = emit.inputs["k_cache"], emit.inputs["v_cache"]
        live = emit.op("live_entries", k, emit.length)
    else:
        loaded = emit.room("load")
        k, v, live = (emit.call(_item, loaded, index) for index in range(3))
    score = emit.inputs.get("score") or score_rows(emit, None, k, v, live)
    # a row that has not reached its limit waits, whatever its neighbours do
    count = emit.op("hold_back", live, count_entries(emit), interval=select.interval)
    keep = select_rows(emit, score, live, count)
    if "score" in emit.inputs:
        emit.op("compact_entries", keep, emit.inputs["score"])
    if store.compacts:
        rope = emit.plan.site.rope if select.positions == "cache" else None
        turn = None if rope is None else emit.frequencies()
        emit.room("compact", keep, turn, style="half" if rope is None else rope.style)
        return
    k = rotate_to_entries(emit, (k,), keep, None, None)[0]
    for name, layout in store.buffers(emit.plan.site).items():
        if layout.counter:
            emit.call(aten.zero_.default, emit.inputs[name])
    emit.room("store", k, v, keep)


PROGRAMS: dict[str, Callable[[Emitter, fx.Node, fx.Node, fx.Node], fx.Node]] = {
    "prefill": _prefill,
    "extend": _extend,
    "decode": _decode,
}


def _item(values: tuple[object, ...], index: int) -> object:
    return values[index]


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
