"""The pass that lets every op name the backend that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx
from torch.fx.node import map_arg

from kvfx.errors import UnsupportedShape
from kvfx.graph import Graph, Level
from kvfx.op_table import BACKENDS
from kvfx.ops import backend_for, constraint, name_of, overload
from kvfx.pass_manager import Pass, Statistics
from kvfx.provenance import origin


@dataclass(frozen=True)
class SelectBackend(Pass):
    """Set the overload of each kvfx op to a backend; one that cannot run is an error, never a
    fallback. Ops without kernels of their own are torch code on every device: `.reference`.

    Before:  kvfx.attend_dense(q, ...)
    After:   kvfx.attend_dense.triton(q, ...)
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
                raise UnsupportedShape(
                    f"{_site(node)}: kvfx.{name} has no backend {self.backend!r}: choose one of "
                    f"{', '.join(BACKENDS)}, or 'auto'"
                )
            backend = backend_for(name, self.backend)
            args, kwargs = map_arg((node.args, dict(node.kwargs)), _value)
            reason = constraint(name, backend, args, kwargs)
            if reason is not None:
                raise UnsupportedShape(
                    f"{_site(node)}: kvfx.{name}.{backend} cannot run: {reason}; "
                    "backend='reference' can"
                )
            node.target = overload(name, backend)
            stats.hit(f"{name}.{backend}")


def _value(node: fx.Node) -> Any:
    """What a node computes, on fake tensors."""
    return node.meta["val"]


def _site(node: fx.Node) -> str:
    mark = origin(node)
    return mark.site if mark is not None and mark.site else "the model"
