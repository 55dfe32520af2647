"""Attention written out as products around a softmax: where it begins and where it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from kvfx.graph import Graph, Miss, operand, site_path
from kvfx.passes.peel_scores import CASTS, PRODUCTS, RESHAPES

aten = torch.ops.aten
UNCHANGED = (
    *CASTS,
    aten.to.dtype_layout,
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
)
# what may stand between weights and the product with values, in a graph that was just captured
PASSED = (*UNCHANGED, *RESHAPES, aten.dropout.default, aten.slice.Tensor)
# the weight of a sink's rest, from the product back to the scores
GATE = (
    aten.unsqueeze.default,
    aten.sigmoid.default,
    aten.sub.Tensor,
    aten.logsumexp.default,
)


@dataclass(frozen=True)
class WrittenOut:
    """One attention: its softmax, the product of weights and values, and the logits [H] of a gate
    behind it, if there is one.
    """

    softmax: fx.Node
    product: fx.Node
    sinks: fx.Node | None


def softmax_roots(graph: Graph) -> dict[fx.Node, WrittenOut]:
    """The attentions that are written out, by the node that returns what they compute."""
    roots = {}
    for softmax in graph.calls(aten.softmax.int):
        product = _product_behind(softmax)
        if isinstance(product, fx.Node):
            root, sinks = _sink_gate(product, softmax) or (product, None)
            roots[root] = WrittenOut(softmax, product, sinks)
    return roots


def stray_softmaxes(graph: Graph) -> dict[str, Miss]:
    """The softmaxes over tokens that no product with values follows, by the path of their module:
    attention that is not understood, and that must not be overlooked.
    """
    stray = {}
    for node in graph.calls(aten.softmax.int):
        found = _product_behind(node)
        if isinstance(found, Miss) and _is_over_tokens(graph, node):
            stray[site_path(node)] = Miss(found.reason, site_path(node))
    return stray


def _product_behind(softmax: fx.Node) -> fx.Node | Miss:
    """The product that takes the weights of a softmax to the values."""
    weights = softmax
    while len(used := users_of(weights)) == 1 and used[0].target in PASSED:
        weights = used[0]
        if weights.target is aten.dropout.default and weights.args[1] != 0.0 and weights.args[2]:
            return Miss(f"dropout is live (p={weights.args[1]}): put the model into eval mode")
    if len(used) != 1:
        return Miss("the weights of attention are used elsewhere too")
    if used[0].target not in PRODUCTS or used[0].args[0] is not weights:
        return Miss(f"{used[0].target} takes the weights, not a product with values")
    return used[0]


def _sink_gate(product: fx.Node, softmax: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The end of an attention whose sinks are a gate behind it, and the sinks [H]: `product *
    sigmoid(logsumexp(scores) - sinks)` is what a softmax with one more logit per head gives.
    """
    used = users_of(product)
    if len(used) != 1 or used[0].target is not aten.mul.Tensor:
        return None
    node, sinks = used[0].args[1], None
    for target in GATE:
        while isinstance(node, fx.Node) and node.target in UNCHANGED:
            node = node.args[0]
        if not isinstance(node, fx.Node) or node.target is not target:
            return None
        sinks = operand(node, 1) if target is aten.sub.Tensor else sinks
        node = node.args[0]
    while sinks is not None and sinks.op != "get_attr" and len(sinks.all_input_nodes) == 1:
        sinks = sinks.all_input_nodes[0]
    if sinks is None or sinks.op != "get_attr" or sinks.meta["val"].dim() != 1:
        return None
    return (used[0], sinks) if node is softmax.args[0] else None


def users_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that use a value; assertions do not."""
    return [user for user in node.users if user.users]


def _is_over_tokens(graph: Graph, softmax: fx.Node) -> bool:
    """Whether there are as many numbers under a softmax as there are tokens."""
    inputs = graph.module.graph.find_nodes(op="placeholder")
    length = next((x.meta["val"].shape[1] for x in inputs if x.target == "input_ids"), None)
    shape = operand(softmax, 0).meta["val"].shape
    size = shape[cast(int, softmax.args[1])]
    if not isinstance(size, torch.SymInt) or not isinstance(length, torch.SymInt):
        return False
    return bool(size.node.expr.free_symbols & length.node.expr.free_symbols)
