"""The pass that turns a tensor which is filled piece by piece into one `cat` of the pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import fx

from kvfx.graph import Graph, Level, Miss, call, operand, replace
from kvfx.pass_manager import Pass, Statistics
from kvfx.provenance import Stamp, module_path

aten = torch.ops.aten
EMPTY = (
    aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default,
    aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default,
)  # fmt: skip


@dataclass(frozen=True)
class JoinWrites(Pass):
    """Replace writes into slices of a new tensor by one `cat`: what is computed from what can then
    be read off the graph.

    Before:  k = new_empty(x, [b, 4, s, 24])
             copy_(slice(k, 3, 0, 16), nope);  copy_(slice(k, 3, 16, end), rope)
    After:   k = cat([nope, rope], 3)
    """

    name: ClassVar[str] = "join-writes"
    consumes: ClassVar[Level] = Level.CANONICAL
    produces: ClassVar[Level] = Level.CANONICAL

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Join every tensor whose slices are all written, once each, before it is read."""
        for node in (node for node in graph.nodes if node.target in EMPTY):
            writes = [write for user in node.users for write in user.users if _is_write(write)]
            if not writes:
                continue
            joined = _pieces(node, writes)
            if isinstance(joined, Miss):
                stats.miss(joined)
                continue
            axis, pieces = joined
            last = max(writes, key=graph.nodes.index)
            with graph.module.graph.inserting_after(last):
                mark = Stamp(module_path(node).removeprefix("model."), "cat", self.name)
                whole = call(graph, aten.cat.default, (pieces, axis), mark)
            slices = [operand(write, 0) for write in writes]
            for old in (*writes, *slices):
                graph.module.graph.erase_node(old)
            replace(node, whole)
            stats.hit("cat")


def _is_write(node: fx.Node) -> bool:
    return node.target is aten.copy_.default


def _pieces(node: fx.Node, writes: list[fx.Node]) -> tuple[int, list[fx.Node]] | Miss:
    """The axis along which pieces are written side by side, and the pieces in order."""
    slices = [operand(write, 0) for write in writes]
    order = {other: index for index, other in enumerate(node.graph.nodes)}
    last = max(map(order.__getitem__, writes))
    if any(user not in slices and order[user] < last for user in node.users):
        return Miss("a tensor is read while it is filled", node.name)
    for target, write in zip(slices, writes, strict=True):
        if target.target is not aten.slice.Tensor or set(target.users) != {write} or write.users:
            return Miss("a tensor is filled in another way than slice by slice", node.name)
        given, held = operand(write, 1).meta["val"], target.meta["val"]
        same = [str(size) for size in given.shape] == [str(size) for size in held.shape]
        if not same or given.dtype != held.dtype:
            return Miss("what is written into a slice is of another shape or dtype", node.name)
    axes = {cast(int, target.args[1]) for target in slices}
    if len(axes) > 1:
        return Miss("slices along different axes are written", node.name)
    (axis,), end = axes, 0
    pairs = sorted(zip(slices, writes, strict=True), key=lambda pair: _start(pair[0]))
    for target, _ in pairs:
        if _start(target) != end or target.args[4:] not in ((), (1,)):
            return Miss("the written slices leave gaps or overlap", node.name)
        end = end + target.meta["val"].shape[axis]
    if str(end) != str(node.meta["val"].shape[axis]):
        return Miss("the written slices leave gaps or overlap", node.name)
    return axis, [operand(write, 1) for _, write in pairs]


def _start(target: fx.Node) -> int:
    """Where a slice begins; -1 where that is no constant."""
    start = target.args[2] if len(target.args) > 2 else 0
    return start if isinstance(start, int) else -1
