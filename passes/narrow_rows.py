"""Going on with some of the rows: everything behind a node works on those alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import sympy
import torch
from torch import Tensor, fx

from kvfx.errors import UnsupportedShape
from kvfx.graph import Graph, call, dependents, infer
from kvfx.ops import overload
from kvfx.provenance import Stamp

aten = torch.ops.aten


@dataclass(frozen=True)
class Narrowing:
    """Which rows are left: `chosen` [B, n] are their indices and `kept` [B, n] their positions; the
    model reads positions at `shown` [B, S], where padding is hidden.
    """

    graph: Graph
    shown: fx.Node
    chosen: fx.Node
    kept: fx.Node
    mark: Stamp
    narrowed: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @property
    def rows(self) -> sympy.Expr:
        """The size that counts all rows."""
        return self.shown.meta["val"].shape[1].node.expr

    def behind(self, source: fx.Node) -> None:
        """Let everything computed from `source`, whose rows are the chosen ones already, work on
        the chosen rows; the values of these nodes are inferred again.

        Before:  x' = add(x, linear(reshape(source, [b, s, -1])));  k = mul(linear(x'), cos)
        After:   x' = add(take_rows(x, rows), linear(reshape(source, [b, n, -1])))
                 k = mul(linear(x'), cos of the positions of these rows)

        What is computed from tokens is taken along its axis of rows, what is computed from
        positions or sizes alone is computed again. Raises UnsupportedShape, naming the node, for a
        value of tokens that has not exactly one axis of rows.
        """
        inside = dependents(self.graph, [source])
        by_tokens = dependents(self.graph, [self.graph.input("input_ids")])
        for node in self.graph.nodes:
            if node not in inside or node is source:
                continue
            with self.graph.module.graph.inserting_before(node):
                found = {
                    operand: self._narrow(operand, by_tokens)
                    for operand in node.all_input_nodes
                    if operand not in inside
                }
            for operand, new in found.items():
                if new is not operand:
                    node.replace_input_with(operand, new)
            if node.op == "call_function":
                infer(node)

    def _narrow(self, node: fx.Node, by_tokens: set[fx.Node]) -> fx.Node:
        """The same value for the chosen rows: the node itself where rows do not matter."""
        if node in self.narrowed:
            return self.narrowed[node]
        if node.op == "get_attr" or not (counts_rows(node, self.rows) or node in by_tokens):
            return node
        self.narrowed[node] = new = self._made(node, by_tokens)
        return new

    def _made(self, node: fx.Node, by_tokens: set[fx.Node]) -> fx.Node:
        if node is self.shown:
            return call(self.graph, aten.clamp_min.default, (self.kept, 0), self.mark)
        if node.target is aten.sym_size.int:
            # a size of rows alone: of another product, the operand would have to be narrowed first
            _refuse_unless(_size(node.meta["val"]) == self.rows, node, "reads a product of sizes")
            return call(self.graph, aten.sym_size.int, (self.kept, 1), self.mark)
        if node in by_tokens:
            axes = row_axes(node, self.rows)
            _refuse_unless(len(axes) == 1, node, f"has {len(axes)} axes of rows instead of one")
            return call(
                self.graph, overload("take_rows"), (node, self.chosen), self.mark, axis=axes[0]
            )
        assert callable(node.target), f"{node.format_node()} counts rows and calls nothing"
        args, kwargs = fx.map_arg(
            (node.args, dict(node.kwargs)), lambda other: self._narrow(other, by_tokens)
        )
        return call(self.graph, node.target, args, self.mark, **kwargs)


def refuse_counted_rows(graph: Graph) -> None:
    """Raise an UnsupportedShape for a model that tells rows apart by their index: rows at other
    positions would get wrong values.
    """
    inputs = [graph.input("input_ids"), graph.input("position_ids")]
    known, (batch, rows) = dependents(graph, inputs), map(_size, inputs[0].meta["val"].shape)
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or node in known or not node.users:
            continue
        # as many as there are tokens in the batch: experts number them, and ask for no position
        sizes = [_size(size).free_symbols for size in value.shape]
        counted = any(rows in size and batch not in size for size in sizes)
        _refuse_unless(not counted, node, "counts rows by their index")


def counts_rows(node: fx.Node, rows: sympy.Expr) -> bool:
    """Whether the value of a node is, or has the shape of, something that counts rows."""
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, Tensor) else (value,)
    symbol = cast(sympy.Symbol, rows)
    return any(symbol in _size(size).free_symbols for size in sizes)


def row_axes(node: fx.Node, rows: sympy.Expr) -> list[int]:
    """The axes of a tensor that are as long as there are rows."""
    value = node.meta["val"]
    sizes = value.shape if isinstance(value, Tensor) else ()
    return [axis for axis, size in enumerate(sizes) if _size(size) == rows]


def _size(size: object) -> sympy.Expr:
    """A size as an expression; what is no size is zero."""
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.Integer(size if isinstance(size, int) else 0)


def _refuse_unless(holds: bool, node: fx.Node, why: str) -> None:
    if not holds:
        raise UnsupportedShape(
            f"{node.format_node()} {why}: this model cannot compute some of its rows alone"
        )
