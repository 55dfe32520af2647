"""The cheapest cut through what K and V of a site are computed from, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import sympy
import torch
from torch import Tensor, fx

from kvfx.graph import Graph, Miss, ancestors, dependents, operand
from kvfx.min_cut import INFINITE, least_cut

aten = torch.ops.aten
# what leaves the order of elements alone: the axis of tokens has to stay behind as many of them
# fmt: off
RESHAPES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.squeeze.dim, aten.squeeze.default, aten.unsqueeze.default,
}
SIZED = RESHAPES | {aten.expand.default}
# ops whose result has an axis of tokens only if they treat every token alone
TOKEN_WISE = SIZED | {
    aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default,
    aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default,
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.linalg_vector_norm.default,
    aten.transpose.int, aten.permute.default, aten.split.Tensor, aten.split_with_sizes.default,
    aten.chunk.default, aten.unbind.int, aten.select.int, aten.slice.Tensor, aten.cat.default,
    aten.stack.default, aten.clone.default, aten.contiguous.default, aten.to.dtype,
    aten._to_copy.default, aten.type_as.default, aten.view_as_complex.default,
    aten.view_as_real.default, aten.repeat_interleave.self_int, aten.silu.default,
    aten.gelu.default,
}
# fmt: on


@dataclass(frozen=True)
class Cut:
    """Tensors of the graph that K and V of a site are computed from, token by token, and how.

    `names` are the nodes. `template` has an input for each of them, then the batch and the number
    of rows; it returns K and V. `shapes` are the sizes of each tensor besides batch and tokens,
    `axes` where its tokens are.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[int, ...]
    template: fx.Graph

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers per token of each tensor."""
        return tuple(int(sympy.prod(shape)) for shape in self.shapes)


class Tokens:
    """What the nodes of a graph have to do with tokens."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.batch, self.rows = (
            _size(size) for size in graph.input("input_ids").meta["val"].shape[:2]
        )
        self.known = dependents(graph, [graph.input("input_ids")])
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.sizes = {node: size for node in graph.nodes if (size := self._size(node))}
        self._before: dict[fx.Node, sympy.Expr | None] = {}
        self.constants: set[fx.Node] = set()
        for node in graph.nodes:
            known = all(source in self.constants for source in node.all_input_nodes)
            if node.op == "get_attr" or (node.op == "call_function" and known):
                self.constants.add(node)

    def before(self, value: object) -> sympy.Expr | None:
        """The product of the sizes in front of the axis of tokens, of a tensor [B, ..., S, ...] or
        [B S, ...] or of several alike; None for any other.
        """
        if isinstance(value, (list, tuple)):
            found = [self.before(each) for each in value]
            return found[0] if found and None not in found else None
        if not isinstance(value, Tensor) or value.dim() == 0:
            return None
        sizes = [_size(size) for size in value.shape]
        if sizes[0] == self.batch * self.rows and all(size.is_Integer for size in sizes[1:]):
            return self.batch
        others = [size for size in sizes[1:] if size != self.rows]
        if sizes[0] != self.batch or len(others) != len(sizes) - 2:
            return None
        if not all(size.is_Integer for size in others):
            return None
        return cast(sympy.Expr, sympy.prod(sizes[: sizes.index(self.rows)]))

    def holds(self, node: fx.Node) -> sympy.Expr | None:
        """The same of what a node computes."""
        if node not in self._before:
            self._before[node] = self.before(node.meta.get("val"))
        return self._before[node]

    def axis(self, value: object) -> int | None:
        """Where the tokens of a tensor [B, ..., S, ...] are."""
        if not isinstance(value, Tensor) or self.before(value) is None:
            return None
        sizes = [_size(size) for size in value.shape]
        return sizes.index(self.rows) if sizes[0] == self.batch else None

    def shape(self, value: Tensor) -> tuple[int, ...]:
        """The sizes of such a tensor besides batch and tokens."""
        axis = self.axis(value)
        return tuple(int(size) for at, size in enumerate(value.shape) if at not in (0, axis))

    def _size(self, node: fx.Node) -> str:
        """`"batch"` or `"rows"` for a node that is this size, else ""."""
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt):
            return ""
        return {self.batch: "batch", self.rows: "rows"}.get(_size(value), "")

    def alone(self, node: fx.Node) -> bool:
        """Whether a node computes each token from what its operands hold for that token, and from
        constants.
        """
        target = node.target
        name = getattr(target, "__name__", "")
        pointwise = isinstance(target, torch._ops.OpOverload) and (
            torch.Tag.pointwise in target.tags and not target._schema.is_mutable
        )
        if node.op != "call_function" or not (
            pointwise or target in TOKEN_WISE or name == "getitem"
        ):
            return False
        before = self.holds(node)
        if before is None:
            return False
        given = [source for source in node.all_input_nodes if source not in self.constants]
        sizes = [source for source in given if isinstance(source.meta.get("val"), torch.SymInt)]
        if sizes and target not in SIZED:
            return False
        held = [self.holds(source) for source in given if source not in sizes]
        if not held or None in held:
            return False
        return target not in RESHAPES or held == [before]


def find_cut(tokens: Tokens, attention: fx.Node) -> Cut | Miss:
    """The cut of the fewest bytes per token, as near to K and V as it can be; K and V themselves
    where nothing is narrower.

    What others than this attention read may be cut, but is not looked behind.
    """
    k, v = operand(attention, 1), operand(attention, 2)
    for name, node in (("K", k), ("V", v)):
        if tokens.axis(node.meta["val"]) is None:
            return Miss(f"{name} has no axis of tokens, at {node.name}")
    inside = ancestors([attention])
    edges: list[tuple[fx.Node, fx.Node]] = []
    ends: set[fx.Node] = set()
    todo, seen = [k, v], {k, v}
    while todo:
        node = todo.pop()
        shared = any(user in tokens.known and user not in inside for user in node.users)
        if (shared and node in tokens.known and node not in (k, v)) or not tokens.alone(node):
            ends.add(node)
            continue
        for source in node.all_input_nodes:
            if source in tokens.constants or tokens.holds(source) is None:
                continue
            edges.append((source, node))
            if source not in seen:
                seen.add(source)
                todo.append(source)
    dtype = k.meta["val"].dtype
    weights = {node: _bytes(tokens, node, dtype) for node in seen}
    chosen = least_cut(weights, edges, ends, (k, v))
    cut = sorted(chosen, key=tokens.order.__getitem__)
    if sum(map(weights.__getitem__, cut)) >= INFINITE:
        return Miss("K and V are of different dtypes")
    axes = tuple(cast(int, tokens.axis(node.meta["val"])) for node in cut)
    shapes = tuple(tokens.shape(node.meta["val"]) for node in cut)
    return Cut(tuple(node.name for node in cut), shapes, axes, _template(tokens, cut, (k, v)))


def _size(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _bytes(tokens: Tokens, node: fx.Node, dtype: torch.dtype) -> int:
    """Bytes per token of a tensor that can be stored beside others of this dtype."""
    value = node.meta["val"]
    if tokens.axis(value) is None or value.dtype != dtype:
        return INFINITE
    return int(sympy.prod(tokens.shape(value))) * dtype.itemsize


def _template(tokens: Tokens, cut: list[fx.Node], outputs: tuple[fx.Node, fx.Node]) -> fx.Graph:
    """The sub-graph from the cut to K and V, for any batch and number of rows."""
    graph, copied = fx.Graph(), {}
    for node in cut:
        copied[node] = graph.placeholder(node.name)
    sizes = {name: graph.placeholder(name) for name in ("batch", "rows")}
    copied |= {node: sizes[size] for node, size in tokens.sizes.items()}
    needed = ancestors(outputs, stop=copied) - set(copied)
    for node in sorted(needed, key=tokens.order.__getitem__):
        copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(tuple(copied[node] for node in outputs))
    return graph
