"""The pass that keeps reads before writes where Inductor would not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch._ops import OpOverload

from kvfx.graph import Graph, Level, call
from kvfx.op_table import OPS
from kvfx.ops import backend_of, name_of, overload
from kvfx.pass_manager import Pass, Statistics
from kvfx.provenance import Stamp, origin


@dataclass(frozen=True)
class SnapshotReads(Pass):
    """Let code that Inductor sees through read a copy of a buffer that an opaque op writes behind
    it.

    Inductor computes such code where its result is needed. That may be behind the write: it orders
    what it has computed by then, not what it still has to compute (torch 2.13). An opaque op is
    never postponed, so its copy holds what was there before.

    Before:  store_entries(x, keep, length, score)
             store_dense(k, v, keep, k_cache, v_cache, length)
    After:   old = snapshot(length);  store_entries(x, keep, old, score)
             store_dense(k, v, keep, k_cache, v_cache, length)
    """

    name: ClassVar[str] = "snapshot-reads"
    consumes: ClassVar[Level] = Level.LOWERED
    produces: ClassVar[Level] = Level.LOWERED

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Give the reads between two writes of a buffer one copy, if the second is opaque."""
        place = {node: index for index, node in enumerate(graph.nodes)}
        written: dict[fx.Node, int] = {}
        for write in graph.nodes:
            for buffer in _written(write):
                since = written.get(buffer, -1)
                early = [
                    reader
                    for reader in buffer.users
                    if reader in place
                    and since < place[reader] < place[write]
                    and not _is_opaque(reader)
                ]
                written[buffer] = place[write]
                if early and _is_opaque(write):
                    self._snapshot(graph, buffer, sorted(early, key=place.__getitem__))
                    stats.hit(buffer.name)

    def _snapshot(self, graph: Graph, buffer: fx.Node, readers: list[fx.Node]) -> None:
        mark = origin(readers[0])
        site = mark.site if mark is not None else ""
        with graph.module.graph.inserting_before(readers[0]):
            target = overload("snapshot", "reference")
            copy = call(graph, target, (buffer,), Stamp(site, "snapshot", self.name))
        for reader in readers:
            reader.replace_input_with(buffer, copy)


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """The operands that an op changes in place."""
    if not isinstance(node.target, OpOverload):
        return
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        operand = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        if isinstance(operand, fx.Node):
            yield operand


def _is_opaque(node: fx.Node) -> bool:
    """Whether compilers run a node as it is written, in its place."""
    name = name_of(node.target)
    return name is not None and not (OPS[name].traced and backend_of(node.target) == "reference")
