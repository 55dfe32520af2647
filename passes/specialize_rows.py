"""The pass that fixes the number of rows of a program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import sympy
import torch
from torch import Tensor, fx
from torch.fx.node import Argument
from torch.utils import _pytree as pytree

from kvfx.graph import Graph, Level, fake_mode
from kvfx.pass_manager import Pass, Statistics

aten = torch.ops.aten


@dataclass(frozen=True)
class SpecializeRows(Pass):
    """Let the program read exactly `rows` tokens per call: every size that counted rows becomes a
    constant.

    Before:  s = sym_size(input_ids, 1);  y = view(x, [b, s, -1, 64])
    After:   y = view(x, [b, 1, -1, 64])
    """

    rows: int
    name: ClassVar[str] = "specialize-rows"
    consumes: ClassVar[Level] = Level.RAISED
    produces: ClassVar[Level] = Level.RAISED

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Replace what counts rows by the constant, in the graph and in the shapes of its
        values.
        """
        inputs = graph.input("input_ids"), graph.input("position_ids")
        symbols = (inputs[0].meta["val"].shape[1], graph.input("logits_index").meta["val"].shape[0])
        rows = {symbol.node.expr: self.rows for symbol in symbols}
        for counter in [user for node in inputs for user in node.users if _counts_rows(user)]:
            for reader in list(counter.users):
                reader.args = _replaced(reader.args, counter, self.rows)
            graph.module.graph.erase_node(counter)
            stats.hit("row-count")
        # layers are alike: values of equal shape stand for each other
        known: dict[object, Tensor] = {}
        for node in graph.nodes:
            if "val" in node.meta:
                value = node.meta["val"]
                node.meta["val"] = pytree.tree_map_only(
                    Tensor, lambda t: _narrowed(t, rows, known), value
                )


def _counts_rows(node: fx.Node) -> bool:
    return node.target is aten.sym_size.int and node.args[1:] == (1,)


def _replaced(args: tuple[Argument, ...], old: fx.Node, new: int) -> tuple[Argument, ...]:
    return cast(tuple[Argument, ...], fx.map_arg(args, lambda node: new if node is old else node))


def _narrowed(value: Tensor, rows: Mapping[sympy.Expr, int], known: dict[object, Tensor]) -> Tensor:
    """A fake tensor like `value`, with symbols replaced in its shape."""
    mode = fake_mode(value)
    assert mode is not None
    shape = tuple(
        size.node.expr if isinstance(size, torch.SymInt) else size for size in value.shape
    )
    kind = (shape, value.dtype, value.device)
    if kind not in known:
        narrow = [_narrowed_size(size, rows) for size in value.shape]
        with mode:
            known[kind] = torch.empty(narrow, dtype=value.dtype, device=value.device)
    return known[kind]


def _narrowed_size(size: int | torch.SymInt, rows: Mapping[sympy.Expr, int]) -> int | torch.SymInt:
    """A size with symbols replaced; B * S becomes B, for one row."""
    if not isinstance(size, torch.SymInt):
        return size
    expression = sympy.sympify(size.node.expr.xreplace(rows))
    if expression.is_Integer:
        return int(expression)
    hint = int(expression.subs(dict.fromkeys(expression.free_symbols, 2)))
    return cast(torch.SymInt, size.node.shape_env.create_symintnode(expression, hint=hint))
