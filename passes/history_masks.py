"""The pass that lets the model go on computing the masks that were not proven."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import fx

from kvfx.emit import add_history_inputs
from kvfx.graph import Graph, Level, ancestors, call, infer, operand
from kvfx.pass_manager import Pass, Statistics
from kvfx.provenance import Stamp, stamp

aten = torch.ops.aten


@dataclass(frozen=True)
class HistoryMasks(Pass):
    """Compute each unproven mask over the whole history, and give the attention its newest rows.

    A mask that belongs to no known family says nothing about a cache. Its own sub-graph still does:
    run on all tokens seen so far, its last rows are those of the new tokens.

    Before:  m = mask(input_ids, position_ids);                 kvfx.attention(q, k, v, m, None)
    After:   m = mask(history_ids, history_positions)[T - S:];  kvfx.attention(q, k, v, m, None)
    """

    name: ClassVar[str] = "history-masks"
    consumes: ClassVar[Level] = Level.RAISED
    produces: ClassVar[Level] = Level.RAISED

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Rewrite every attention that still has a mask; graphs without one are left alone."""
        attentions = graph.calls(torch.ops.kvfx.attention.default)
        masked = [node for node in attentions if node.args[3] is not None]
        if not masked:
            return
        history = add_history_inputs(graph)
        rows: dict[fx.Node, fx.Node] = {}
        for node in masked:
            mask = operand(node, 3)
            if mask not in rows:
                with graph.module.graph.inserting_before(node):
                    rows[mask] = self._newest_rows(graph, mask, history)
            node.args = (*node.args[:3], rows[mask], *node.args[4:])
            stats.hit("mask over history")

    def _newest_rows(
        self, graph: Graph, mask: fx.Node, history: tuple[fx.Node, fx.Node]
    ) -> fx.Node:
        """The mask's sub-graph on the history, cut to the rows that are being read."""
        input_ids, position_ids = graph.input("input_ids"), graph.input("position_ids")
        copied: dict[fx.Node, fx.Node] = {input_ids: history[0], position_ids: history[1]}
        needed = ancestors([mask], stop=copied)
        mark = Stamp("", "mask over history", self.name)
        for node in graph.nodes:
            if node in needed and node not in copied:
                copied[node] = graph.module.graph.node_copy(node, copied.__getitem__)
                if node.op == "call_function":
                    infer(copied[node])
                    stamp(copied[node], mark)
        seen = call(graph, aten.sym_size.int, (history[0], 1), mark)
        new = call(graph, aten.sym_size.int, (input_ids, 1), mark)
        start = call(graph, cast("type[int]", operator.sub), (seen, new), mark)
        return call(graph, aten.slice.Tensor, (copied[mask], 2, start), mark)
