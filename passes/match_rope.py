"""The pass that finds the rotary embedding of each site and proves it by rotating."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, fx

from kvfx.constants import tensor_of
from kvfx.geometry import Causal, Chunk, Rope, Site, Unproven, Window
from kvfx.graph import Graph, Level, Miss, ancestors, dependents, operand
from kvfx.pass_manager import Pass, Statistics
from kvfx.provenance import origin
from kvfx.rotation import prove_rotation, rows_axis

aten = torch.ops.aten
# fmt: off
ARITHMETIC = {
    aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.neg.default,
    aten.cat.default, aten.stack.default, aten.slice.Tensor,
    aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints,
    aten.select.int, aten.to.dtype, aten._to_copy.default,
    aten.view.default, aten.reshape.default, aten.transpose.int,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
    aten.permute.default, aten.type_as.default, aten.unflatten.int,
    aten.view_as_complex.default, aten.view_as_real.default,
}
# fmt: on


@dataclass(frozen=True)
class MatchRope(Pass):
    """Learn each site's rotary embedding: pairing, width and frequencies; the graph stays as it is.

    What lies between the key and the nearest single tensor before it (`pre`) is run on unit
    vectors. If it turns them like R(position * frequency) at every probed position, for queries and
    keys alike, it is a rotary embedding.

    Before:  k = pre * cos + rotate_half(pre) * sin
    After:   the same graph; site.rope = Rope("half", frequencies)
    """

    name: ClassVar[str] = "match-rope"
    consumes: ClassVar[Level] = Level.CANONICAL
    produces: ClassVar[Level] = Level.RAISED

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Record one `Site` per attention node, with its rotary embedding where one is proven."""
        position_ids = graph.input("position_ids")
        by_tokens = dependents(graph, [graph.input("input_ids")])
        by_positions = dependents(graph, [position_ids]) - by_tokens
        known: dict[tuple[object, ...], Rope | Miss] = {}
        owners: dict[tuple[object, ...], int] = {}
        sites = []
        for index, node in enumerate(graph.calls(torch.ops.kvfx.attention.default)):
            mark = origin(node)
            assert mark is not None
            if mark.site in graph.missed:
                sites.append(
                    _site(graph, index, mark.site, node, None, graph.missed[mark.site].reason)
                )
                continue
            rope = _same_rope(graph, node, by_positions, by_tokens, known)
            if isinstance(rope, Miss):
                stats.miss(Miss(rope.reason, mark.site))
                rope = None
            else:
                stats.hit(f"rope {rope}")
            site = _site(graph, index, mark.site, node, rope, "")
            # layers that compute no keys and values of their own take those of an earlier one
            owner = owners.setdefault((node.args[1], node.args[2], site.mask), index)
            sites.append(replace(site, reads=None if owner == index else owner))
        graph.sites = tuple(sites)


def _site(
    graph: Graph, index: int, name: str, node: fx.Node, rope: Rope | None, missed: str
) -> Site:
    q, k, v = (operand(node, index).meta["val"] for index in range(3))
    slopes = node.kwargs.get("slopes")
    sizes = ((Window, node.kwargs.get("window")), (Chunk, node.kwargs.get("chunk")))
    seen = (family(cast(int, size)) for family, size in sizes if size is not None)
    return Site(
        index=index,
        name=name,
        heads=int(q.shape[1]),
        kv_heads=int(k.shape[1]),
        head_dim=int(k.shape[3]),
        value_dim=int(v.shape[3]),
        scale=cast(float, node.kwargs["scale"]),
        mask=Unproven(missed) if missed else next(seen, Causal()),
        rope=rope,
        dtype=k.dtype,
        device=k.device,
        softcap=cast(float, node.kwargs.get("softcap", 0.0)),
        slopes=tuple(tensor_of(graph, slopes).tolist()) if isinstance(slopes, fx.Node) else None,
        sinks="sinks" in node.kwargs,
    )


def _same_rope(
    graph: Graph,
    attention: fx.Node,
    by_positions: set[fx.Node],
    by_tokens: set[fx.Node],
    known: dict[tuple[object, ...], Rope | Miss],
) -> Rope | Miss:
    """The one rotary embedding that both the query and the key of an attention went through."""
    found = []
    for rotated in (operand(attention, 0), operand(attention, 1)):
        pre = peel_rotation(rotated, by_positions, by_tokens)
        if isinstance(pre, Miss):
            return pre
        key = _structure(rotated, pre, by_tokens)
        if key not in known:
            known[key] = prove_rotation(graph, rotated, pre)
        found.append(known[key])
    query, key = found
    if isinstance(query, Rope) and isinstance(key, Rope) and query != key:
        return Miss("query and key are rotated differently")
    return query if isinstance(query, Miss) else key


def peel_rotation(
    node: fx.Node, by_positions: set[fx.Node], by_tokens: set[fx.Node]
) -> fx.Node | Miss:
    """The nearest single tensor [B, K, S, D], or [B, S, K, D], that `node` is computed from by
    arithmetic with tensors of positions alone.
    """
    order = {other: index for index, other in enumerate(node.graph.nodes)}
    frontier, mixed = {node}, False
    while not (mixed and len(frontier) == 1 and _is_tensor(*frontier)):
        latest = max(frontier, key=order.__getitem__)
        if latest.target not in ARITHMETIC and getattr(latest.target, "__name__", "") != "getitem":
            return Miss("no rotation by position between the projections and the attention")
        frontier.remove(latest)
        inputs = latest.all_input_nodes
        frontier.update(source for source in inputs if source in by_tokens)
        mixed = mixed or any(source in by_positions for source in inputs)
    pre = frontier.pop()
    return (
        pre
        if pre.meta["val"].dim() == 4
        else Miss(f"rotated before the heads are split, at {pre.name}")
    )


def _is_tensor(node: fx.Node) -> bool:
    """Whether it is one tensor of real channels: pairs may be complex numbers, or an axis."""
    value = node.meta["val"]
    return isinstance(value, Tensor) and not value.is_complex() and value.dim() <= 4


def _structure(node: fx.Node, pre: fx.Node, by_tokens: set[fx.Node]) -> tuple[object, ...]:
    """What decides the rotation from `pre` to `node`: its ops, and the very nodes that carry
    positions.
    """
    inside = ancestors([node], stop=[pre])
    rows: list[object] = [rows_axis(pre), int(pre.meta["val"].shape[3 - rows_axis(pre)])]
    rows.append(int(pre.meta["val"].shape[3]))
    local = {pre: "pre"}
    for other in node.graph.nodes:
        if other in inside and other in by_tokens and other is not pre:
            local[other] = f"%{len(local)}"
            args = fx.map_arg(other.args, lambda n: local.get(n, _position_name(n)))
            rows.append((str(other.target), str(args)))
    return tuple(rows)


def _position_name(node: fx.Node) -> str:
    """A name for a tensor of positions that is equal wherever the same values are computed."""
    while node.target is aten.unsqueeze.default:
        node = operand(node, 0)
    return node.name
