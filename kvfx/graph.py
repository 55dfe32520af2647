"""The graph that passes work on, and the few verbs they use: call, replace, extract, evaluate."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx
from torch.fx.node import Argument, Target
from torch.utils import _pytree as pytree

from kvfx.geometry import Site
from kvfx.provenance import Stamp, module_path, stamp

if TYPE_CHECKING:
    from kvfx.cuts import Cut


class Level(enum.Enum):
    """How far a graph has been compiled; `kvfx/verify.py` says what each level promises."""

    CAPTURED = "captured"
    CANONICAL = "canonical"
    RAISED = "raised"
    CACHED = "cached"
    LOWERED = "lowered"


@dataclass(frozen=True)
class Miss:
    """A falsy answer with a reason: what was looked at and why it did not match."""

    reason: str
    at: str = ""

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.at}: {self.reason}" if self.at else self.reason


@dataclass
class Graph:
    """A `torch.fx.GraphModule` with what the compiler knows about it.

    `program` is empty as long as the graph is the model's, for all programs. `windows` are the
    sliding windows that the model's config names. `missed` are the sites that could not be raised,
    by name; `cuts` say of some what their K and V are computed from.
    """

    module: fx.GraphModule
    level: Level
    windows: tuple[int, ...] = ()
    sites: tuple[Site, ...] = ()
    missed: dict[str, Miss] = field(default_factory=dict)
    program: str = ""
    cuts: dict[str, Cut] = field(default_factory=dict)

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes in order (a copy: safe while the graph changes)."""
        return list(self.module.graph.nodes)

    @property
    def text(self) -> str:
        """The canonical text of the graph."""
        from kvfx.text import canonical_text

        return canonical_text(self)

    def __str__(self) -> str:
        return self.text

    def svg(self, layer: int = 0) -> str:
        """The drawing of a layer, by number, as an SVG document; raises an InputError where there
        is none.
        """
        from kvfx.drawing.boxes import draw_layer
        from kvfx.drawing.svg import svg_of

        title = f"{self.program or 'the model'}, layer {layer} ({self.level.value})"
        return svg_of(draw_layer(self, layer), title)

    def _repr_svg_(self) -> str:
        """The first layer, for notebooks."""
        return self.svg()

    def input(self, name: str) -> fx.Node:
        """The graph input called `name`."""
        inputs = self.module.graph.find_nodes(op="placeholder")
        return next(node for node in inputs if node.target == name)

    def calls(self, target: Target) -> list[fx.Node]:
        """The nodes that call `target`."""
        return [node for node in self.nodes if node.op == "call_function" and node.target is target]

    def copy(self, program: str | None = None) -> Graph:
        """The same graph, to be changed freely, perhaps as a program; weights are shared."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.module.graph, {}))
        last = next(reversed(graph.nodes))
        last.meta = dict(next(reversed(self.module.graph.nodes)).meta)
        module = fx.GraphModule(self.module, graph)
        program = self.program if program is None else program
        missed, cuts = dict(self.missed), dict(self.cuts)
        return Graph(module, self.level, self.windows, self.sites, missed, program, cuts)

    def clean(self) -> None:
        """Drop what nothing uses."""
        self.module.graph.eliminate_dead_code()


def call(
    graph: Graph,
    target: Callable[..., object],
    args: Sequence[Argument],
    mark: Stamp,
    **kwargs: Argument,
) -> fx.Node:
    """Add a stamped node at the insertion point, with its value computed on fake tensors."""
    node = graph.module.graph.call_function(target, tuple(args), kwargs)
    infer(node)
    stamp(node, mark)
    return node


def infer(node: fx.Node) -> None:
    """Compute `meta["val"]` of a call from its operands' values."""
    values = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    args, kwargs = cast(tuple[tuple[Any, ...], dict[str, Any]], values)
    target = cast(Callable[..., object], node.target)
    inputs = [other.meta.get("val") for other in node.graph.find_nodes(op="placeholder")]
    with fake_mode(args, kwargs, inputs) or contextlib.nullcontext():
        node.meta["val"] = target(*args, **kwargs)


def fake_mode(*values: object) -> torch._subclasses.FakeTensorMode | None:
    """The mode that the fake tensors among `values` live in."""
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, torch._subclasses.FakeTensor):
            return leaf.fake_mode
    return None


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let every user of `old` use `new`, which takes over its place in the model; `old` is
    erased.
    """
    if "nn_module_stack" in old.meta:
        new.meta["nn_module_stack"] = old.meta["nn_module_stack"]
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def operand(node: fx.Node, index: int) -> fx.Node:
    """The operand of `node` at `index`, which is a node and not a constant."""
    argument = node.args[index]
    assert isinstance(argument, fx.Node), f"{node.format_node()} has no node at {index}"
    return argument


def site_path(node: fx.Node) -> str:
    """The module path that names the site of an attention node."""
    return module_path(node).removeprefix("model.")


def ancestors(outputs: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """Every node that `outputs` are computed from, themselves included; the walk does not go above
    `stop`.
    """
    ends, seen, todo = set(stop), set(), list(outputs)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in ends:
            todo.extend(node.all_input_nodes)
    return seen


def dependents(graph: Graph, sources: Iterable[fx.Node]) -> set[fx.Node]:
    """Every node whose values are computed from `sources`, themselves included; reading a size does
    not count.
    """
    found = set(sources)
    for node in graph.nodes:
        if node.target is not torch.ops.aten.sym_size.int and found & set(node.all_input_nodes):
            found.add(node)
    return found


def extract(
    module: fx.GraphModule, outputs: Sequence[fx.Node], inputs: Sequence[fx.Node]
) -> fx.GraphModule:
    """The sub-graph from `inputs` to `outputs` as a module of its own; weights are shared."""
    needed = ancestors(outputs, stop=inputs)
    graph, copied = fx.Graph(), {}
    for node in inputs:
        copied[node] = graph.placeholder(node.name)
    for node in module.graph.nodes:
        if node in needed and node not in copied:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(tuple(copied[node] for node in outputs))
    return fx.GraphModule(module, graph)
