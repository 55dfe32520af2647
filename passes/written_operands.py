"""The operands of an attention that is written out around a softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import fx
from torch.fx.node import Argument

from kvfx.graph import Graph, Miss, call, operand, site_path
from kvfx.passes.peel_scores import CASTS, PRODUCTS, RESHAPES, Scores, peel_scores
from kvfx.passes.softmax_root import WrittenOut, users_of
from kvfx.provenance import Stamp

aten = torch.ops.aten
FLATTENED = (*RESHAPES, aten.flatten.using_ints)


@dataclass(frozen=True)
class AttentionOperands:
    """What `kvfx.attention` takes: queries, keys and values [B, H, S, D], K and V as they are
    before each of their heads is repeated `kv_repeat` times for grouped queries; a mask, and the
    rules of scores. Where `flat`, the model goes on with batch and heads as one axis.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float
    kv_repeat: int = 1
    sinks: fx.Node | None = None
    softcap: float = 0.0
    flat: bool = False

    def rules(self) -> dict[str, Argument]:
        """What attention does besides scaled products, as arguments of `kvfx.attention`."""
        found = {"softcap": self.softcap or None, "sinks": self.sinks}
        return {name: value for name, value in found.items() if value is not None}


def written_operands(graph: Graph, root: fx.Node, written: WrittenOut) -> AttentionOperands | Miss:
    """Read the operands of one attention that ends in `root`, or say why they cannot be read.

    Casts in between are those of the arithmetic and are left out.
    """
    softmax = written.softmax
    if cast(int, softmax.args[1]) % len(softmax.meta["val"].shape) != softmax.meta["val"].dim() - 1:
        return Miss(f"softmax over axis {softmax.args[1]}, not over keys")
    scores = peel_scores(graph, softmax)
    if isinstance(scores, Miss):
        return scores
    if _leaks(scores.product, root):
        return Miss("the scores of attention are used elsewhere too")
    if (scores.sinks is not None) != _drops_last(softmax) or (scores.sinks and written.sinks):
        return Miss("a logit is added to the scores and not dropped again, or dropped unadded")
    if not scores.masks:
        return Miss("attention is bidirectional: nothing is added to its scores")
    mark = Stamp(site_path(root), "softmax", "match-attention")
    with graph.module.graph.inserting_before(root):
        return _operands(graph, scores, written, mark)


def _leaks(product: fx.Node, root: fx.Node) -> bool:
    """Whether anything that comes from the scores goes around the root."""
    seen, todo = {root}, [product]
    while todo:
        node = todo.pop()
        if node.op == "output":
            return True
        if node not in seen:
            seen.add(node)
            todo.extend(node.users)
    return False


def _drops_last(softmax: fx.Node) -> bool:
    """Whether the last weight is cut off before the product."""
    node, cut = softmax, False
    while node.target not in PRODUCTS:
        (node,) = users_of(node)
        if node.target is aten.slice.Tensor:
            last = cast(int, node.args[1]) % node.meta["val"].dim() == node.meta["val"].dim() - 1
            cut |= last and tuple(node.args[2:]) == (0, -1)
    return cut


def _operands(
    graph: Graph, scores: Scores, written: WrittenOut, mark: Stamp
) -> AttentionOperands | Miss:
    flat = written.product.meta["val"].dim() == 3
    q, k_t, v = (
        _with_heads(x) for x in (scores.q, scores.k_transposed, operand(written.product, 1))
    )
    if q is None or k_t is None or v is None:
        return Miss("batch and heads are one axis: kvfx reads [B, H, S, D]")
    k = _with_heads(_keys_of(graph, k_t, mark) or k_t)
    if k is None or k is k_t:
        return Miss("scores are no product with transposed keys")
    mask = _sum(graph, [_scaled(graph, x, q, mark) for x in scores.masks], mark)
    sinks = scores.sinks if written.sinks is None else written.sinks
    return AttentionOperands(
        q, k, v, mask, scores.scale, sinks=sinks, softcap=scores.softcap, flat=flat
    )


def _with_heads(node: fx.Node) -> fx.Node | None:
    """The tensor with axes [B, H, ., .] of which `node` is a cast, or whose batch and heads it
    makes one axis.
    """
    while node.target in CASTS:
        node = operand(node, 0)
    if node.meta["val"].dim() == 4:
        return node
    if node.target in FLATTENED:
        source = operand(node, 0)
        if source.target is aten.clone.default:
            source = operand(source, 0)
        new, old = node.meta["val"].shape, source.meta["val"].shape
        same = [str(size) for size in new[1:]] == [str(size) for size in old[2:]]
        return source if len(old) == 4 and len(new) == 3 and same else None
    if node.target is aten.transpose.int:
        # keys are transposed with or without the axis of heads
        return node
    return None


def _keys_of(graph: Graph, node: fx.Node, mark: Stamp) -> fx.Node | None:
    """The keys [B, K, S, D], or [B K, S, D], of which `node` has the last two axes swapped."""
    dim = node.meta["val"].dim()
    if node.target is aten.transpose.int:
        axes = {cast(int, axis) % dim for axis in node.args[1:]}
        return operand(node, 0) if axes == {dim - 1, dim - 2} else None
    if node.target is aten.permute.default:
        first, second, third, fourth = (axis % 4 for axis in cast("list[int]", node.args[1]))
        if (first, second, fourth, third) == (0, 1, 2, 3):
            return operand(node, 0)
        return call(
            graph, aten.permute.default, (operand(node, 0), [first, second, fourth, third]), mark
        )
    return None


def _scaled(graph: Graph, mask: tuple[fx.Node, float], q: fx.Node, mark: Stamp) -> fx.Node:
    """A mask with its factor, with batch and heads apart as those of q [B, H, S, D] are."""
    node, factor = mask
    if factor != 1.0:
        node = call(graph, aten.mul.Tensor, (node, factor), mark)
    if node.meta["val"].dim() == 3:
        node = call(graph, aten.unflatten.int, (node, 0, [-1, int(q.meta["val"].shape[1])]), mark)
    return node


def _sum(graph: Graph, masks: list[fx.Node], mark: Stamp) -> fx.Node:
    total = masks[0]
    for mask in masks[1:]:
        total = call(graph, aten.add.Tensor, (total, mask), mark)
    return total
