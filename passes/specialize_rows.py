"""The pass that fixes the number of rows of a program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfx.graph import Graph, Level, infer
from kvfx.pass_manager import Pass, Statistics

aten = torch.ops.aten


@dataclass(frozen=True)
class SpecializeRows(Pass):
    """Let the program read exactly `rows` tokens per call: every size that counted rows becomes a constant.

    Before:  s = sym_size(input_ids, 1);  y = view(x, [b, s, -1, 64])
    After:   y = view(x, [b, 1, -1, 64])
    """

    rows: int
    name: ClassVar[str] = "specialize-rows"
    consumes: ClassVar[Level] = Level.RAISED
    produces: ClassVar[Level] = Level.RAISED

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Narrow the inputs, replace their sizes, and compute every value anew."""
        for name in ("input_ids", "position_ids"):
            node = graph.input(name)
            node.meta["val"] = node.meta["val"][:, : self.rows]
            for user in list(node.users):
                if user.target is aten.sym_size.int and user.args[1] == 1:
                    user.replace_all_uses_with(self.rows)
                    graph.module.graph.erase_node(user)
                    stats.hit("row-count")
        logits_index = graph.input("logits_index")
        logits_index.meta["val"] = logits_index.meta["val"][: self.rows]
        for node in graph.nodes:
            if node.op == "call_function":
                infer(node)
