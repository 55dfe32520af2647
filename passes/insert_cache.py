"""The pass that introduces the KV cache: each attention becomes its plan's ops, per program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import fx

from kvfx.emit import Emitter, add_buffer_inputs, add_tokens_input
from kvfx.graph import Graph, Level, call, operand, replace
from kvfx.pass_manager import Pass, Statistics
from kvfx.planner import Plan
from kvfx.programs import PROGRAMS, allocate_layers, compact, keep_rows, masked, read
from kvfx.provenance import Stamp, origin

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
        attentions, known, online = _attentions(graph), {}, []
        last = {site.reads: site for site in self.plan.sites if site.reads is not None}
        inputs: list[dict[str, fx.Node]] = []
        for index, site in enumerate(self.plan.sites):
            own = site.reads is None
            inputs.append(
                add_buffer_inputs(graph, site, known) if own else inputs[cast(int, site.reads)]
            )
            attention = attentions.get(site.site.name)
            emit = Emitter(
                graph, site, inputs[index], tokens, self.name, attention, shared=index in last
            )
            stats.hit(f"{self.program} {site.store.room}" if own else f"{self.program} read")
            if self.program == "compact":
                if own:
                    with graph.module.graph.inserting_before(_output(graph)):
                        compact(emit)
                continue
            assert attention is not None
            q, k, v = (operand(attention, i) for i in range(3))
            with graph.module.graph.inserting_before(attention):
                if attention.args[3] is not None:
                    out = masked(emit, q, k, v, operand(attention, 3))
                elif own:
                    out = PROGRAMS[self.program](emit, q, k, v)
                else:
                    out = read(emit, self.program, q, k, v)
            if emit.shared and self.program == "extend":
                # the last site that reads these rows has to see them beside the cache, not in it
                reader = attentions[last[index].site.name]
                with graph.module.graph.inserting_before(reader.next):
                    keep_rows(emit, k, v)
            replace(attention, out)
            if self.program == "prefill" and site.allocate is not None and own:
                online.append(emit)
        if online:
            with graph.module.graph.inserting_before(_output(graph)):
                allocate_layers(online)
        if self.program == "compact":
            for name in ("input_ids", "position_ids", "logits_index"):
                graph.module.graph.erase_node(graph.input(name))


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
