"""The constants of a graph: numbers and tensors that it holds, and new ones."""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import Tensor, fx

from kvfx.graph import Graph, fake_mode

aten = torch.ops.aten
# what leaves a number as it is
SAME_NUMBER = (
    aten.to.dtype,
    aten._to_copy.default,
    aten.lift_fresh_copy.default,
    aten.detach_.default,
)


def tensor_of(graph: Graph, node: fx.Node) -> Tensor:
    """The weight, buffer or constant that a `get_attr` node reads."""
    return operator.attrgetter(str(node.target))(graph.module)


def number_of(graph: Graph, value: object) -> float | None:
    """The one number that an argument stands for, or None."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    if value.op == "get_attr":
        tensor = tensor_of(graph, value)
        return float(tensor.item()) if tensor.numel() == 1 else None
    if value.target is aten.full.default and list(cast(list, value.args[0])) in ([], [1]):
        return number_of(graph, value.args[1])
    if value.target in SAME_NUMBER:
        return number_of(graph, value.args[0])
    return None


def add_constant(graph: Graph, name: str, value: Tensor) -> fx.Node:
    """A tensor that the graph holds under `name`, at the insertion point; one that it has already
    is not added again.
    """
    if hasattr(graph.module, name):
        known = graph.module.graph.find_nodes(op="get_attr")
        return next(node for node in known if node.target == name)
    graph.module.register_buffer(name, value)
    node = graph.module.graph.get_attr(name)
    mode = fake_mode(graph.input("position_ids").meta["val"])
    assert mode is not None
    node.meta["val"] = mode.from_tensor(value, static_shapes=True)
    return node
