"""The pass that lets every op name the backend that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.errors import UnsupportedShape
from kvfx.graph import Graph, Level
from kvfx.ops import BACKENDS, name_of, overload
from kvfx.pass_manager import Pass, Statistics
from kvfx.provenance import origin


@dataclass(frozen=True)
class SelectBackend(Pass):
    """Set the overload of each kvfx op to a backend; one that cannot run is an error, never a
    fallback.

    Before:  kvfx.attend_dense(q, ...)
    After:   kvfx.attend_dense.reference(q, ...)
    """

    backend: str
    name: ClassVar[str] = "select-backend"
    consumes: ClassVar[Level] = Level.CACHED
    produces: ClassVar[Level] = Level.LOWERED

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Name the backend on every abstract op."""
        for node in graph.nodes:
            name = name_of(node.target)
            if node.op != "call_function" or name is None:
                continue
            if self.backend not in BACKENDS:
                mark = origin(node)
                where = mark.site if mark is not None and mark.site else "the model"
                raise UnsupportedShape(
                    f"{where}: kvfx.{name} has no backend {self.backend!r}: choose one of "
                    f"{', '.join(BACKENDS)}, or 'auto'"
                )
            node.target = overload(name, self.backend)
            stats.hit(f"{name}.{self.backend}")
