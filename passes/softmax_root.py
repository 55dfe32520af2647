"""Attention written out as products around a softmax: where it begins and ends, and peelers that
read its operands.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from kvfx.graph import Graph, Miss, operand

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default,)
CASTS = (aten.to.dtype, aten._to_copy.default)
# what may stand between weights and the product with values, in a graph that was just captured
PASSED = (
    *CASTS,
    aten.to.dtype_layout,
    aten.dropout.default,
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
)
SUMS = (aten.add.Tensor, aten.add_.Tensor)
# the last two axes, as a permutation and as pairs
SWAPPED = [0, 1, 3, 2]
LAST_TWO = ({-1, -2}, {2, 3})


@dataclass(frozen=True)
class WrittenOut:
    """What stands around a softmax: queries, keys and values [B, H, S, D], what is added to scores
    before it, and the factors of the products and of that mask.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float
    mask_scale: float


def softmax_roots(graph: Graph) -> dict[fx.Node, fx.Node]:
    """The product with the values behind each softmax over keys, and that softmax."""
    roots = {}
    for node in graph.calls(aten.softmax.int):
        weights = node
        while len(used := _users(weights)) == 1 and used[0].target in PASSED:
            weights = used[0]
        for user in weights.users:
            if user.target in PRODUCTS and user.args[0] is weights:
                roots[user] = node
    return roots


def _users(node: fx.Node) -> list[fx.Node]:
    """The nodes that use a value; assertions do not."""
    return [user for user in node.users if user.users]


def match_softmax(graph: Graph, root: fx.Node, softmax: fx.Node) -> WrittenOut | Miss:
    """Read the operands of one attention that ends in `root`, or say why they cannot be read.

    Scores are a product, times constants, plus at most one mask; casts in between are those of the
    arithmetic and are left out.
    """
    if softmax.args[1] not in (-1, 3):
        return Miss(f"softmax over axis {softmax.args[1]}, not over keys")
    score, mask, scale, mask_scale = operand(softmax, 0), None, 1.0, 1.0
    while score.target not in PRODUCTS:
        if score.target in CASTS:
            score = operand(score, 0)
        elif score.target in SUMS and len(score.args) == 2 and not score.kwargs:
            if mask is not None:
                return Miss("two tensors are added to the scores")
            score, mask = _scores_first(score)
            mask_scale = scale
        elif (factor := _factor(graph, score)) is not None:
            scale, score = scale * factor, operand(score, 0)
        else:
            return Miss(f"{score.format_node()} between the product and the softmax")
    q, k = _uncast(operand(score, 0)), _transposed(_uncast(operand(score, 1)))
    if k is None:
        return Miss("scores are no product with transposed keys")
    return WrittenOut(q, _uncast(k), _uncast(operand(root, 1)), mask, scale, mask_scale)


def _scores_first(addition: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Scores and what is added to them: a mask has one head, or is no product at all."""
    left, right = operand(addition, 0), operand(addition, 1)
    return (left, right) if _is_score(left) else (right, left)


def _is_score(node: fx.Node) -> bool:
    while node.op == "call_function" and node.all_input_nodes and node.target not in PRODUCTS:
        node = node.all_input_nodes[0]
    return node.target in PRODUCTS


def _factor(graph: Graph, node: fx.Node) -> float | None:
    """What a product or a quotient with one number multiplies by, or None."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or len(node.args) != 2:
        return None
    number = node.args[1]
    if isinstance(number, fx.Node):
        if number.op != "get_attr":
            return None
        value = operator.attrgetter(str(number.target))(graph.module)
        if value.numel() != 1:
            return None
        number = value.item()
    factor = float(cast(float, number))
    return factor if node.target is aten.mul.Tensor else 1.0 / factor


def _uncast(node: fx.Node) -> fx.Node:
    """The tensor before it was cast for the arithmetic."""
    return operand(node, 0) if node.target in CASTS else node


def _transposed(node: fx.Node) -> fx.Node | None:
    """The keys [B, K, S, D] of which `node` is [B, K, D, S], or None."""
    if node.target is aten.transpose.int and set(node.args[1:]) in LAST_TWO:
        return operand(node, 0)
    if node.target is aten.permute.default and list(cast(list, node.args[1])) == SWAPPED:
        return operand(node, 0)
    return None
