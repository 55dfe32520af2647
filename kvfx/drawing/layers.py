"""Which layer of the model a node belongs to, and what one node is in words."""

from __future__ import annotations

import re

from torch import fx

from kvfx.graph import Graph
from kvfx.provenance import module_path, origin
from kvfx.text import canonical_text

# a module path up to its first number
LAYER = re.compile(r"^(?:[^.]+\.)*?\d+(?=\.|$)")


def layer_in(path: str) -> str:
    """The layer that a module path lies in, "" for none: `model.layers.3.mlp` is in
    `model.layers.3`.
    """
    found = LAYER.match(path)
    return found.group() if found else ""


def path_of(node: fx.Node) -> str:
    """The module path of a node: of its site where a pass made it, else of the captured model."""
    mark = origin(node)
    if mark is not None and mark.site:
        return mark.site
    return module_path(node).removeprefix("model.")


def layer_of(node: fx.Node) -> str:
    """The path of the layer that computes `node`, "" for none."""
    return layer_in(path_of(node)) if node.op == "call_function" else ""


def layers_of(graph: Graph) -> dict[str, list[fx.Node]]:
    """The nodes of each layer in order, by the path of the layer; what no layer computes is left
    out.
    """
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        layer = layer_of(node)
        if layer:
            found.setdefault(layer, []).append(node)
    order = {layer_in(site.name): site.index for site in graph.sites}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def lines_of(graph: Graph) -> dict[fx.Node, str]:
    """The line of canonical text of each node; weights have none."""
    nodes = [node for node in graph.nodes if node.op != "get_attr"]
    return dict(zip(nodes, canonical_text(graph).splitlines(), strict=True))


def value_in(line: str) -> str:
    """The dtype and shape that a line of canonical text names: `f32[B,S,64]`; "" for none."""
    found = re.match(r"%\w+: (.*?)(?: = |$)", line)
    return found.group(1) if found else ""
