"""Which nodes of a layer matter, and how those that belong together become one group."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from kvfx.drawing.layers import path_of
from kvfx.graph import Graph
from kvfx.ops import backend_of, name_of
from kvfx.provenance import module_path, origin

CONTRACTIONS = {"linear", "addmm", "mm", "bmm", "matmul", "baddbmm", "conv1d"}
NORMS = {"layer_norm", "native_layer_norm", "rms_norm", "group_norm"}
ACTIVATIONS = {"silu", "gelu", "relu", "tanh", "sigmoid", "softplus", "mish", "relu6", "elu"}
ATTENTIONS = {"scaled_dot_product_attention", "softmax", "_softmax"}
ACTIVATION_CLASS = re.compile(r"activation|gelu|silu|relu|swish|sigmoid", re.IGNORECASE)
# kvfx ops that compute what an attention returns
ATTENDS = re.compile(r"attention$|attend_|extend_(?!entries)")


@dataclass(frozen=True)
class Group:
    """Nodes that are drawn as one box, and what the box says."""

    kind: str
    title: str
    subtitle: str
    nodes: tuple[fx.Node, ...]


def groups_of(graph: Graph, nodes: list[fx.Node]) -> list[Group]:
    """The groups among `nodes`, in order; views, casts and small arithmetic are in none."""
    ropes = _ropes(graph, nodes)
    members: dict[tuple[str, object], list[fx.Node]] = {}
    for node in nodes:
        key = _key(node, ropes)
        if key is not None:
            members.setdefault(key, []).append(node)
    return [_group(graph, kind, tuple(found)) for (kind, _), found in members.items()]


def op_name(node: fx.Node) -> str:
    """The name of what a node calls, without namespace and overload."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return str(getattr(target, "__name__", target))


def _key(node: fx.Node, ropes: dict[fx.Node, int]) -> tuple[str, object] | None:
    """The kind of a node, and what it shares with those in one group; None for what is not
    drawn.
    """
    name, own = op_name(node), name_of(node.target)
    if own is not None:
        kind = "linear" if own == "linear" else "attention" if ATTENDS.match(own) else "kvfx"
        return kind, node
    if origin(node) is not None:
        return None
    module = _class(node)
    if "norm" in module.lower() or name in NORMS:
        return "norm", module_path(node)
    if node in ropes:
        return "rope", ropes[node]
    if ACTIVATION_CLASS.search(module):
        return "act", module_path(node)
    if name in ACTIVATIONS or name in ATTENTIONS:
        return "attention" if name in ATTENTIONS else "act", node
    if name in CONTRACTIONS:
        return ("linear" if _weights(node) else "op"), node
    if name == "embedding":
        return "op", node
    if name in ("add", "mul") and _joins(node):
        return "join", node
    return None


def _group(graph: Graph, kind: str, nodes: tuple[fx.Node, ...]) -> Group:
    first, own = nodes[0], name_of(nodes[0].target)
    last = module_path(first).rpartition(".")[2]
    if kind == "linear":
        sizes = [_width(node) for node in (*first.all_input_nodes, first) if not _is_weight(node)]
        by = f" · {backend_of(first.target)}" if own is not None else ""
        return Group(kind, last or op_name(first), f"{sizes[0]} → {sizes[-1]}{by}", nodes)
    if own is not None:
        return Group(kind, own, _by(graph, first), nodes)
    if kind == "norm":
        return Group(kind, last or op_name(first), _class(first), nodes)
    if kind == "rope":
        site = next((site for site in graph.sites if site.name == path_of(first)), None)
        about = "" if site is None or site.rope is None else str(site.rope)
        return Group(kind, "rope", about, nodes)
    if kind == "join":
        return Group(kind, {"add": "+", "mul": "×"}[op_name(first)], "", nodes)
    if op_name(first) == "embedding":
        return Group(kind, last or "embedding", "embedding", nodes)
    title = op_name(first) if len(nodes) == 1 else _class(first)
    return Group(kind, title, "", nodes)


def _by(graph: Graph, node: fx.Node) -> str:
    """Who runs a kvfx op; before one is chosen, what is known about its site."""
    backend, mark = backend_of(node.target), origin(node)
    site = next((site for site in graph.sites if mark and site.name == mark.site), None)
    if backend != "default" or site is None:
        return backend
    return f"{site.mask} · {site.heads} heads, {site.kv_heads} KV"


def _class(node: fx.Node) -> str:
    """The class of the innermost module that computes `node`, without its package."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    found = list(stack.values())[-1][1]
    name = found if isinstance(found, str) else found.__name__
    return name.rpartition(".")[2]


def _is_weight(node: fx.Node) -> bool:
    """Whether a value is a weight, perhaps transposed or cast."""
    while len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def _weights(node: fx.Node) -> bool:
    return any(_is_weight(operand) for operand in node.all_input_nodes)


def _width(node: fx.Node) -> object:
    value = node.meta.get("val")
    return value.shape[-1] if isinstance(value, torch.Tensor) and value.dim() else "?"


def _joins(node: fx.Node) -> bool:
    """Whether two streams [B, S, *] of one shape meet: residuals and gates."""
    values = [operand.meta.get("val") for operand in node.all_input_nodes]
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    two = len(values) == len(shapes) == 2 and not _weights(node)
    return two and all(len(shape) == 3 for shape in shapes) and shapes[0][-1] == shapes[1][-1]


def _ropes(graph: Graph, nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """The nodes that turn queries or keys by their positions, numbered by what they turn."""
    angles: set[fx.Node] = set()
    turned: dict[fx.Node, int] = {}
    inside = set(nodes)
    for node in graph.nodes:
        operands = [other for other in node.all_input_nodes if other.op == "call_function"]
        if op_name(node) in ("cos", "sin"):
            angles.add(node)
        elif node.op == "call_function" and name_of(node.target) is None and operands:
            found = [other for other in operands if other in angles or other in turned]
            if all(_is_angle(other, angles) for other in operands) and found:
                angles.add(node)
            elif found and node in inside:
                turned[node] = _join(turned, found, len(turned))
    return turned


def _is_angle(node: fx.Node, angles: set[fx.Node]) -> bool:
    return node in angles or isinstance(node.meta.get("val"), torch.SymInt)


def _join(turned: dict[fx.Node, int], operands: Iterable[fx.Node], new: int) -> int:
    """One number for a node and all that it is computed from."""
    numbers = {turned[operand] for operand in operands if operand in turned}
    number = min(numbers, default=new)
    for node, old in turned.items():
        if old in numbers:
            turned[node] = number
    return number
