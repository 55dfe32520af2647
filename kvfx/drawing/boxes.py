"""What is drawn of a layer: one box for everything that matters, one edge for every value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from kvfx.drawing.buffers import Versions, buffer_of, operands_of
from kvfx.drawing.kinds import groups_of, op_name
from kvfx.drawing.layers import layers_of, lines_of, path_of, value_in
from kvfx.errors import InputError
from kvfx.graph import Graph
from kvfx.ops import name_of
from kvfx.provenance import origin

# names of the buffers that fit into a box
NAMED = 2
STREAM = "x"
ELSEWHERE = "other layers"


@dataclass(frozen=True)
class Box:
    """One thing that is drawn: `kind` names its look, `nodes` are what it stands for, `buffers`
    those of the site that a cache holds.
    """

    kind: str
    title: str
    subtitle: str
    nodes: tuple[fx.Node, ...] = ()
    buffers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Edge:
    """A value on its way from one box to another, by their numbers; `label` names the operand."""

    source: int
    target: int
    label: str = ""


@dataclass(frozen=True)
class Drawing:
    """The boxes of one layer, and the edges between them."""

    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]


def draw_layer(graph: Graph, layer: int) -> Drawing:
    """The drawing of a layer, by number; raises an InputError where there is none."""
    layers = list(layers_of(graph).values())
    if not 0 <= layer < len(layers):
        known = f"it has 0 to {len(layers) - 1}" if layers else "it has none"
        raise InputError(f"layer={layer!r}: the graph has no such layer, {known}")
    return draw(graph, layers[layer], lines_of(graph))


def draw(graph: Graph, nodes: list[fx.Node], lines: dict[fx.Node, str]) -> Drawing:
    """The drawing of these nodes of `graph`, whose canonical text has these `lines`.

    Views, casts and small arithmetic are not drawn: edges pass through them.
    """
    groups, versions = groups_of(graph, nodes), Versions(nodes)
    sketch = _Sketch(versions, set(nodes), lines)
    for group in groups:
        sketch.add(Box(group.kind, group.title, group.subtitle, group.nodes))
    for held in versions.held:
        subtitle = ", ".join(held) if len(held) <= NAMED else f"{len(held)} buffers"
        sketch.caches.append(sketch.add(Box("cache", versions.title, subtitle, (), held)))
    for group in groups:
        target = sketch.made[group.nodes[0]]
        for node in group.nodes:
            for name, operand in _operands(node):
                sketch.connect(node, operand, target, name)
            if node in versions.written:
                sketch.edge(target, sketch.caches[versions.written[node]], "")
    sketch.add_outputs(nodes)
    edges = (Edge(*ends, ", ".join(labels)) for ends, labels in sketch.edges.items())
    return Drawing(tuple(sketch.boxes), tuple(edges))


@dataclass
class _Sketch:
    """A drawing in the making: `made` is the box of each node that has one, `caches` those of the
    states of the cache, `inputs` those of what comes from outside.
    """

    versions: Versions
    inside: set[fx.Node]
    lines: dict[fx.Node, str]
    boxes: list[Box] = field(default_factory=list)
    edges: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    made: dict[fx.Node, int] = field(default_factory=dict)
    caches: list[int] = field(default_factory=list)
    inputs: dict[str, int] = field(default_factory=dict)

    def add(self, box: Box) -> int:
        """The number of a new box."""
        self.boxes.append(box)
        self.made.update(dict.fromkeys(box.nodes, len(self.boxes) - 1))
        return len(self.boxes) - 1

    def edge(self, source: int, target: int, label: str) -> None:
        """An edge, drawn once for all operands that take it."""
        if source != target:
            labels = self.edges.setdefault((source, target), [])
            labels.extend([label] if label and label not in labels else [])

    def connect(self, reader: fx.Node, operand: fx.Node, target: int, label: str) -> None:
        """The edges to a box from whatever `operand` comes from."""
        for source in dict.fromkeys(self._sources(reader, operand)):
            named = "" if self.boxes[source].kind == "cache" else label
            self.edge(source, target, named)

    def add_outputs(self, nodes: list[fx.Node]) -> None:
        """The boxes of what other layers use."""
        outputs: dict[str, int] = {}
        for node in nodes:
            if all(user in self.inside for user in node.users) or not _is_tensor(node):
                continue
            title = STREAM if origin(node) is None else ELSEWHERE
            if title not in outputs:
                outputs[title] = self.add(Box("output", title, value_in(self.lines[node])))
            self.connect(node, node, outputs[title], "")

    def _sources(self, reader: fx.Node, operand: fx.Node) -> Iterator[int]:
        """The boxes that a value comes from, through everything that is not drawn."""
        seen, todo = set(), [(reader, operand)]
        while todo:
            reader, node = todo.pop()
            if node in seen or not _is_tensor(node):
                continue
            seen.add(node)
            if node in self.made:
                yield self.made[node]
            elif buffer_of(node) is not None:
                if reader in self.versions.read:
                    yield self.caches[self.versions.read[reader]]
            elif node in self.inside:
                todo.extend((node, other) for other in reversed(node.all_input_nodes))
            elif node.op == "call_function" and not _is_quiet(node):
                yield self._input(node)

    def _input(self, node: fx.Node) -> int:
        """The box of what comes from outside of the layer."""
        value = node.meta["val"]
        stream = isinstance(value, torch.Tensor) and value.dim() == 3 and value.is_floating_point()
        title = STREAM if stream else op_name(node)
        title = ELSEWHERE if origin(node) is not None else title
        if title not in self.inputs:
            self.inputs[title] = self.add(Box("input", title, value_in(self.lines[node])))
        return self.inputs[title]


def _operands(node: fx.Node) -> list[tuple[str, fx.Node]]:
    """The operands of a node that are values, with their names where the op is one of kvfx's."""
    if name_of(node.target) in (None, "linear"):
        # drawn like the model's own, whose operands have no names
        return [("", operand) for operand in node.all_input_nodes]
    return [(name, value) for name, value, _ in operands_of(node) if isinstance(value, fx.Node)]


def _is_tensor(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), (torch.SymInt, int))


def _is_quiet(node: fx.Node) -> bool:
    """Whether a value from outside is the same for every layer and only says where rows stand."""
    mark = origin(node)
    placed = mark is not None and not mark.site
    return placed or path_of(node).rpartition(".")[2].startswith("rotary")
