"""The pass that makes equal layers share one region, so that one layer is compiled and called once
per layer.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from kvfx.graph import Graph, Level, Miss, ancestors, dependents
from kvfx.pass_manager import Pass, Statistics
from kvfx.provenance import module_path, origin

LAYER = re.compile(r"^(?:.*?\.)?\d+(?=\.|$)")
PRELUDE, EPILOGUE = "prelude", "epilogue"
# where they stand, whatever they are computed from
ENDS = {"placeholder": 0, "get_attr": 0, "output": 5}


@dataclass(frozen=True)
class OutlineLayers(Pass):
    """Move each layer, what comes before the layers and what comes after them into regions; equal
    layers share one.

    Weights and buffers become inputs of a region. A layer that is entangled with others (something
    outside of it is both computed from it and used by it) leaves the whole graph as it is.

    Before:  x1 = <40 nodes>(x0, @w0, %k0);  x2 = <40 nodes>(x1, @w1, %k1)
    After:   x1 = layer_0(x0, @w0, %k0);     x2 = layer_0(x1, @w1, %k1)
    """

    name: ClassVar[str] = "outline-layers"
    consumes: ClassVar[Level] = Level.LOWERED
    produces: ClassVar[Level] = Level.LOWERED

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Group the nodes, check that every group can run as one call, and rebuild the graph from
        the calls.
        """
        groups = _groups(graph)
        order = _order(graph, groups)
        entangled = _entangled(order, groups)
        if entangled is not None:
            stats.miss(entangled)
            return
        graph.module = _rebuild(graph, order, groups, stats)


def _groups(graph: Graph) -> dict[fx.Node, str]:
    """The region of each node that has one: its layer, the prelude, or the epilogue."""
    groups = {node: layer for node in graph.nodes if _is_body(node) and (layer := _layer(node))}
    after = dependents(graph, groups)
    before = ancestors(groups)
    for node in graph.nodes:
        if _is_body(node) and node not in groups and not (node in after and node in before):
            groups[node] = EPILOGUE if node in after else PRELUDE
    return groups


def _is_body(node: fx.Node) -> bool:
    """Whether a node computes tensors; sizes and weights stay outside, as inputs of regions."""
    return node.op == "call_function" and not isinstance(node.meta.get("val"), torch.SymInt | int)


def _layer(node: fx.Node) -> str:
    """The path of the layer that a node belongs to, "" for none: up to the first number in its
    module path.
    """
    mark = origin(node)
    path = mark.site if mark is not None else module_path(node).removeprefix("model.")
    found = LAYER.match(path)
    return found.group() if found else ""


def _order(graph: Graph, groups: dict[fx.Node, str]) -> list[fx.Node]:
    """The nodes with inputs, weights and the prelude first and the epilogue last."""

    def rank(node: fx.Node) -> int:
        if node not in groups and node.op not in ENDS and ancestors([node]).isdisjoint(groups):
            return 1
        return ENDS.get(node.op, {PRELUDE: 2, EPILOGUE: 4}.get(groups.get(node, ""), 3))

    return sorted(graph.nodes, key=rank)


def _entangled(order: list[fx.Node], groups: dict[fx.Node, str]) -> Miss | None:
    """Why the groups cannot run one after the other: a node needs a group that is not complete yet.
    None if they can.
    """
    place = {node: index for index, node in enumerate(order)}
    complete = {
        group: place[node]
        for node, group in sorted(groups.items(), key=lambda item: place[item[0]])
    }
    for node in order:
        runs = complete.get(groups.get(node, ""), place[node])
        for operand in node.all_input_nodes:
            group = groups.get(operand)
            if group != groups.get(node) and complete.get(group or "", place[operand]) > runs:
                return Miss(
                    f"{node.name} needs {operand.name} before it is there",
                    groups.get(node, group or ""),
                )
    return None


def _rebuild(
    graph: Graph, order: list[fx.Node], groups: dict[fx.Node, str], stats: Statistics
) -> fx.GraphModule:
    """The graph with one call per region, placed where the last node of the region stood."""
    members: dict[str, list[fx.Node]] = defaultdict(list)
    for node in order:
        if node in groups:
            members[groups[node]].append(node)
    outer, env = fx.Graph(), {}
    shared: dict[tuple[object, ...], str] = {}
    regions: dict[str, fx.GraphModule] = {}
    for node in order:
        group = groups.get(node)
        if group is None:
            env[node] = outer.node_copy(node, env.__getitem__)
            continue
        if node is not members[group][-1]:
            continue
        inputs, outputs = _boundary(members[group])
        key = _structure(members[group], inputs)
        if key not in shared:
            name = (
                group
                if group in (PRELUDE, EPILOGUE)
                else f"layer_{len(regions) - (PRELUDE in regions)}"
            )
            shared[key] = name
            regions[name] = _region(graph.module, members[group], inputs, outputs)
        stats.hit(shared[key])
        result = outer.call_module(shared[key], tuple(env[operand] for operand in inputs))
        for index, output in enumerate(outputs):
            env[output] = outer.call_function(_item, (result, index))
    for name, region in regions.items():
        setattr(graph.module, name, region)
    return fx.GraphModule(graph.module, outer)


def _item(values: tuple[object, ...], index: int) -> object:
    return values[index]


def _boundary(nodes: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a region reads from outside, in order of first use, and what it gives to the outside."""
    inside = set(nodes)
    inputs = dict.fromkeys(
        operand for node in nodes for operand in node.all_input_nodes if operand not in inside
    )
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    return list(inputs), outputs


def _region(
    root: fx.GraphModule, nodes: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]
) -> fx.GraphModule:
    """The nodes as a module of their own, with everything they read as inputs."""
    graph, env = fx.Graph(), {}
    for index, operand in enumerate(inputs):
        env[operand] = graph.placeholder(f"input_{index}")
        env[operand].meta = dict(operand.meta)
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[node] for node in outputs))
    region = fx.GraphModule(root, graph)
    # it may be there for what it writes
    region.__dict__["_is_impure"] = True
    return region


def _structure(nodes: list[fx.Node], inputs: list[fx.Node]) -> tuple[object, ...]:
    """Equal for two regions exactly when one module can run both: same ops, constants, wiring and
    input shapes.
    """
    names: dict[fx.Node, str] = {operand: f"%input_{index}" for index, operand in enumerate(inputs)}
    rows: list[object] = [_shape(operand.meta.get("val")) for operand in inputs]
    for index, node in enumerate(nodes):
        operands = fx.map_arg((node.args, node.kwargs), names.__getitem__)
        rows.append((node.target, repr(operands)))
        names[node] = f"%{index}"
    return tuple(rows)


def _shape(value: object) -> object:
    """The static part of an input's type; sizes known only at run time are equal to each other."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return value.dtype, tuple(
        "*" if isinstance(size, torch.SymInt) else size for size in value.shape
    )
