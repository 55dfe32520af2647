"""The pass that lets decode stream its weights at memory bandwidth on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfx.graph import Graph, Level, call, replace
from kvfx.ops import overload
from kvfx.pass_manager import Pass, Statistics
from kvfx.provenance import Stamp, module_path


@dataclass(frozen=True)
class StreamWeights(Pass):
    """Turn linear layers into `kvfx.linear`, which Inductor compiles to a fused matrix-vector loop
    for one row.

    Before:  y = linear(x, w)
    After:   y = kvfx.linear(x, w)
    """

    name: ClassVar[str] = "stream-weights"
    consumes: ClassVar[Level] = Level.CACHED
    produces: ClassVar[Level] = Level.CACHED

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Rewrite every `aten.linear`."""
        for node in graph.calls(torch.ops.aten.linear.default):
            with graph.module.graph.inserting_before(node):
                mark = Stamp(module_path(node).removeprefix("model."), "linear", self.name)
                streamed = call(graph, overload("linear"), node.args, mark)
            replace(node, streamed)
            stats.hit("linear")
