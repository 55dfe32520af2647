"""The pass that finds positions which a model counts from the length of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kvfx.graph import Graph, Level, Miss, ancestors, call, dependents, extract, infer, operand
from kvfx.pass_manager import Pass, Statistics
from kvfx.provenance import Stamp, module_path

aten = torch.ops.aten
LENGTHS = (11, 17)
CASTS = (aten.to.dtype, aten._to_copy.default)


@dataclass(frozen=True)
class MatchPositions(Pass):
    """Look up position embeddings, and rotate, by `position_ids`: behind a cache, rows do not begin
    at zero.

    An index is proven by evaluation: `arange(S)` plus a constant, at two lengths.

    Before:  x = embedding(weight, arange(0, S) + 2)
    After:   x = embedding(weight, position_ids + 2)
    """

    name: ClassVar[str] = "match-positions"
    consumes: ClassVar[Level] = Level.CANONICAL
    produces: ClassVar[Level] = Level.CANONICAL

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Rewrite every lookup, and every rotary phase, that counts from the length."""
        inputs = [graph.input(name) for name in ("input_ids", "position_ids", "logits_index")]
        known = dependents(graph, inputs)
        for node in graph.nodes:
            counted = _counted(node)
            if counted is None or counted in known or not _counts(counted):
                continue
            offset = fit_positions(graph, counted)
            if isinstance(offset, Miss):
                stats.miss(Miss(offset.reason, module_path(node)))
                continue
            mark = Stamp(module_path(node), "counted", self.name)
            with graph.module.graph.inserting_before(node):
                positions: fx.Node = inputs[1]
                if offset:
                    positions = call(graph, aten.add.Tensor, (positions, offset), mark)
                if node.target in CASTS:
                    axis, dtype = _spare_axis(counted), node.meta["val"].dtype
                    positions = call(graph, aten.unsqueeze.default, (positions, axis), mark)
                    found = call(graph, aten.to.dtype, (positions, dtype), mark)
                else:
                    table = operand(node, 0)
                    found = call(graph, aten.embedding.default, (table, positions), mark)
            _take_over(node, found)
            stats.hit(f"positions + {offset}")


def _counted(node: fx.Node) -> fx.Node | None:
    """What may count rows: the index of a table of two axes, or whole numbers [1, 1, S] and
    [1, S, 1] that are made fractions, as phases of a rotation are; None for any other node.
    """
    if node.target is aten.embedding.default:
        return operand(node, 1)
    if node.target is aten.index.Tensor and operand(node, 0).op == "get_attr":
        indices = cast("list[fx.Node]", node.args[1])
        return indices[0] if len(indices) == 1 and operand(node, 0).meta["val"].dim() == 2 else None
    if node.target in CASTS and node.meta["val"].is_floating_point():
        source = operand(node, 0)
        whole = not source.meta["val"].is_floating_point() and source.meta["val"].dim() == 3
        return source if whole and _spare_axis(source) else None
    return None


def _spare_axis(node: fx.Node) -> int | None:
    """Which of the last two axes of a tensor [B, ., .] has one number, where it is one of them."""
    spare = [axis for axis in (1, 2) if str(node.meta["val"].shape[axis]) == "1"]
    return spare[0] if len(spare) == 1 else None


def _counts(index: fx.Node) -> bool:
    """Whether an index comes from a range as long as the input."""
    return any(
        node.target in (aten.arange.start, aten.arange.default) for node in ancestors([index])
    )


def fit_positions(graph: Graph, index: fx.Node) -> int | Miss:
    """The constant by which an index differs from the positions 0, 1, 2 ... of every row."""
    inputs = [graph.input("input_ids"), graph.input("position_ids")]
    probe, offsets = extract(graph.module, [index], inputs), set()
    device = inputs[0].meta["val"].device
    for length in LENGTHS:
        ids = torch.zeros(2, length, dtype=torch.int64, device=device)
        found: Tensor = probe(ids, ids)[0]
        if found.dim() == 3 and (axis := _spare_axis(index)) is not None:
            found = found.squeeze(axis)
        if found.dim() > 2 or found.shape[-1] != length:
            return Miss(f"an index {list(found.shape)} is looked up for rows [2, {length}]")
        offset = found - torch.arange(length, device=device)
        if not bool((offset == offset.flatten()[0]).all()):
            return Miss("an index counts from the length, but not by one from row to row")
        offsets.add(int(offset.flatten()[0]))
    return offsets.pop() if len(offsets) == 1 else Miss("an index depends on the length itself")


def _take_over(old: fx.Node, new: fx.Node) -> None:
    """Let the users of `old` [S, E] or [1 or B, S, E] use `new` [B, S, E], whose batch they carry
    on.
    """
    if old.meta["val"].dim() == 2:
        for user in list(old.users):
            if user.target is aten.unsqueeze.default and user.args[1] == 0:
                user.replace_all_uses_with(new)
                user.graph.erase_node(user)
    if "nn_module_stack" in old.meta:
        new.meta["nn_module_stack"] = old.meta["nn_module_stack"]
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
    changed = {new}
    for node in new.graph.nodes:
        if node.op == "call_function" and changed & set(node.all_input_nodes):
            before = _shapes(node)
            infer(node)
            if before != _shapes(node):
                changed.add(node)


def _shapes(node: fx.Node) -> list[str]:
    return [str(getattr(x, "shape", x)) for x in pytree.tree_leaves(node.meta["val"])]
