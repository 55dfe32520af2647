"""What a model does to its scores before the softmax, read from the softmax back to the product."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import fx

from kvfx.constants import number_of
from kvfx.graph import Graph, Miss, ancestors, call, operand, site_path
from kvfx.provenance import Stamp

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default)
SUMS = (aten.add.Tensor, aten.add_.Tensor)
FACTORS = (aten.mul.Tensor, aten.div.Tensor)
FLOORS = (
    aten.max.other,
    aten.maximum.default,
    aten.clamp_min.default,
    aten.clamp.default,
)
FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
# a number that leaves nothing of a weight
HIDDEN = -1e4


@dataclass
class Scores:
    """Scores are `scale` times the `product` of queries with transposed keys, capped at `softcap`
    if it is not 0, plus masks with their factors; `sinks` [H] are logits beside them.
    """

    product: fx.Node
    q: fx.Node
    k_transposed: fx.Node
    scale: float
    softcap: float
    masks: list[tuple[fx.Node, float]]
    sinks: fx.Node | None


@dataclass
class _Peeler:
    """What was read so far; `scale` multiplies whatever is left to read."""

    graph: Graph
    mark: Stamp
    scale: float = 1.0
    softcap: float = 0.0
    masks: list[tuple[fx.Node, float]] = field(default_factory=list)
    sinks: fx.Node | None = None


def peel_scores(graph: Graph, softmax: fx.Node) -> Scores | Miss:
    """Read everything between a softmax and the product of queries and keys."""
    peeler = _Peeler(graph, Stamp(site_path(softmax), "softmax", "match-attention"))
    score = operand(softmax, 0)
    while score.target not in PRODUCTS:
        inner = next((found for peel in PEELS if (found := peel(peeler, score)) is not None), None)
        if inner is None:
            return Miss(f"{score.target} stands between the product and the softmax")
        if isinstance(inner, Miss):
            return inner
        score = inner
    first = 0
    if score.target is aten.baddbmm.default:
        if peeler.softcap:
            return Miss("a mask is added to scores before they are capped")
        beta, alpha = (float(cast(float, score.kwargs.get(name, 1))) for name in ("beta", "alpha"))
        peeler.masks.append((operand(score, 0), peeler.scale * beta))
        peeler.scale, first = peeler.scale * alpha, 1
    q, k = operand(score, first), operand(score, first + 1)
    return Scores(score, q, k, peeler.scale, peeler.softcap, peeler.masks, peeler.sinks)


def peel_cast(peeler: _Peeler, score: fx.Node) -> fx.Node | None:
    """A change of dtype, or of shape between [B, H, S, T] and [B H, S, T]."""
    del peeler
    if score.target in RESHAPES:
        new, old = score.meta["val"].shape, operand(score, 0).meta["val"].shape
        same = [str(size) for size in new[-2:]] == [str(size) for size in old[-2:]]
        return operand(score, 0) if same and {len(new), len(old)} <= {3, 4} else None
    return operand(score, 0) if score.target in CASTS else None


def peel_shift(peeler: _Peeler, score: fx.Node) -> fx.Node | None:
    """A row's largest score, subtracted from the row: softmax does not see it."""
    del peeler
    if score.target is not aten.sub.Tensor or not isinstance(score.args[1], fx.Node):
        return None
    shift = score.args[1]
    if shift.target is operator.getitem:
        shift = operand(shift, 0)
    largest = shift.target in (aten.max.dim, aten.amax.default)
    return operand(score, 0) if largest and shift.args[0] is score.args[0] else None


def peel_sinks(peeler: _Peeler, score: fx.Node) -> fx.Node | Miss | None:
    """One logit per head beside the scores: cat([scores, sinks], -1)."""
    if score.target is not aten.cat.default or len(cast("list[fx.Node]", score.args[0])) != 2:
        return None
    scores, sinks = cast("list[fx.Node]", score.args[0])
    while sinks.target in (*RESHAPES, *CASTS, aten.expand.default, aten.unsqueeze.default):
        sinks = operand(sinks, 0)
    changed = peeler.masks or peeler.softcap or peeler.scale != 1.0
    if sinks.op != "get_attr" or sinks.meta["val"].dim() != 1 or changed:
        return Miss("what is beside the scores is not one learned logit per head")
    peeler.sinks = sinks
    return scores


def peel_mask(peeler: _Peeler, score: fx.Node) -> fx.Node | Miss | None:
    """Something that is added to the scores."""
    if score.target not in SUMS or len(score.args) != 2 or score.kwargs:
        return None
    if peeler.softcap:
        return Miss("a mask is added to scores before they are capped")
    if not isinstance(score.args[1], fx.Node):
        # the same number for every key
        return operand(score, 0)
    left, right = operand(score, 0), operand(score, 1)
    scores, mask = (left, right) if _is_score(left) else (right, left)
    peeler.masks.append((mask, peeler.scale))
    return scores


def peel_fill(peeler: _Peeler, score: fx.Node) -> fx.Node | Miss | None:
    """Scores that are replaced where a condition says so: `where(seen, scores, -1e9)`."""
    if score.target is aten.where.self:
        seen, scores, number = operand(score, 0), operand(score, 1), score.args[2]
        hides = False
    elif score.target in FILLS:
        scores, seen, number = operand(score, 0), operand(score, 1), score.args[2]
        hides = True
    else:
        return None
    value = number_of(peeler.graph, number)
    if value is None or value > HIDDEN or peeler.softcap:
        return Miss("scores are replaced by something that does not hide them")
    graph, mark = peeler.graph, peeler.mark
    with graph.module.graph.inserting_before(score):
        hidden = seen if hides else call(graph, aten.logical_not.default, (seen,), mark)
        zeros = call(graph, aten.zeros_like.default, (hidden,), mark, dtype=torch.float32)
        lowest = torch.finfo(torch.float32).min / 4
        mask = call(graph, aten.masked_fill.Scalar, (zeros, hidden, lowest), mark)
    peeler.masks.append((mask, 1.0))
    return scores


def peel_floor(peeler: _Peeler, score: fx.Node) -> fx.Node | None:
    """Scores that are kept above the lowest number: max(scores, -3.4e38)."""
    if score.target not in FLOORS:
        return None
    value = number_of(peeler.graph, score.args[1])
    only = len(score.args) == 2 and not score.kwargs
    return operand(score, 0) if only and value is not None and value < -1e30 else None


def peel_factor(peeler: _Peeler, score: fx.Node) -> fx.Node | None:
    """A product or a quotient with one number."""
    if score.target not in FACTORS or len(score.args) != 2:
        return None
    number = number_of(peeler.graph, score.args[1])
    if number is None:
        return None
    peeler.scale *= number if score.target is aten.mul.Tensor else 1.0 / number
    return operand(score, 0)


def peel_softcap(peeler: _Peeler, score: fx.Node) -> fx.Node | Miss | None:
    """`c * tanh(s / c)`: the factor outside is the cap, and the one inside goes on to the scale."""
    if score.target is not aten.tanh.default:
        return None
    if peeler.softcap:
        return Miss("scores are capped twice")
    peeler.softcap = peeler.scale
    return operand(score, 0)


PEELS = (
    peel_cast,
    peel_factor,
    peel_mask,
    peel_softcap,
    peel_fill,
    peel_sinks,
    peel_shift,
    peel_floor,
)


def _is_score(node: fx.Node) -> bool:
    """Whether a sum's operand is the scores: masks come from positions, not from products."""
    return any(other.target in PRODUCTS for other in ancestors([node]))
