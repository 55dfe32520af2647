"""The pass that proves which rows a mask lets see which keys, and then drops the mask."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, fx
from torch.fx.node import Argument
from torch.utils import _pytree as pytree

from kvfx.geometry import Causal, Mask, Window
from kvfx.graph import Graph, Level, Miss, ancestors, call, extract, operand, replace
from kvfx.pass_manager import Pass, Statistics
from kvfx.provenance import Stamp, origin

aten = torch.ops.aten
SHORTEST = 37
# masks are evaluated at S x S; a longer window is proven with its constant scaled down
LONGEST = 6000
# beyond: the end of a slice, the smallest number of a dtype
HUGE = 2**30
LOWEST = {torch.finfo(torch.float16).max}
SIZES = {aten.sym_size.int}


@dataclass(frozen=True)
class MatchMasks(Pass):
    """Replace each proven mask by the fact it stands for: visibility is decided from positions.

    Before:  o = kvfx.attention(q, k, v, mask, None)
    After:   o = kvfx.attention(q, k, v, None, position_ids, window=W)
    """

    name: ClassVar[str] = "match-masks"
    consumes: ClassVar[Level] = Level.CANONICAL
    produces: ClassVar[Level] = Level.CANONICAL

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Prove each distinct mask once; sites with an unproven mask keep it and are recorded as
        missed.
        """
        proven: dict[fx.Node | None, Mask | Miss] = {None: Causal()}
        for node in graph.calls(torch.ops.kvfx.attention.default):
            q, k, v = (operand(node, index) for index in range(3))
            mask = cast("fx.Node | None", node.args[3])
            mark = origin(node)
            assert mark is not None
            if mask is not None and mask not in proven:
                proven[mask] = prove_mask(graph, mask)
            fact = proven[mask]
            if isinstance(fact, Miss):
                stats.miss(Miss(fact.reason, mark.site))
                graph.missed[mark.site] = Miss(fact.reason, mark.site)
                continue
            with graph.module.graph.inserting_before(node):
                raised = call(
                    graph,
                    torch.ops.kvfx.attention.default,
                    (q, k, v, None, graph.input("position_ids")),
                    Stamp(mark.site, f"{mark.rule}, {fact}", self.name),
                    **{**node.kwargs, "window": fact.size if isinstance(fact, Window) else None},
                )
            replace(node, raised)
            stats.hit(str(fact))


def prove_mask(graph: Graph, mask: fx.Node) -> Mask | Miss:
    """The family of a mask, from its own sub-graph at two lengths beyond every constant in it."""
    input_ids, position_ids = graph.input("input_ids"), graph.input("position_ids")
    nodes = ancestors([mask])
    if any(user in nodes and user.target not in SIZES for user in input_ids.users):
        return Miss("the mask depends on token values")
    if graph.input("logits_index") in nodes:
        return Miss("the mask depends on which logits are asked for")
    long = sorted({value for value in _constants(graph, nodes) if value > LONGEST})
    if long:
        return _prove_scaled(graph, mask, long)
    probe = extract(graph.module, [mask], [input_ids, position_ids])
    return _prove_by_value(
        graph, probe, mask, max((SHORTEST, *_constants(graph, nodes), *_short_windows(graph)))
    )


def _prove_scaled(graph: Graph, mask: fx.Node, long: list[int]) -> Mask | Miss:
    """Prove a mask with one long constant W: with small values in its place, it is their window."""
    if len(long) > 1:
        return Miss(f"the mask has several constants beyond {LONGEST}: {', '.join(map(str, long))}")
    facts = []
    for small in (29, 43):
        probe = extract(
            graph.module, [mask], [graph.input("input_ids"), graph.input("position_ids")]
        )
        changed = False
        for node in probe.graph.nodes:
            args = _scaled(node.args, long[0], small)
            changed |= repr(args) != repr(node.args)
            node.args = args
        if not changed:
            return Miss(f"the mask's constant {long[0]} is a tensor or a factor, too long to probe")
        probe.recompile()
        fact = _prove_by_value(graph, probe, mask, max(SHORTEST, small, *_short_windows(graph)))
        if not fact:
            return fact
        facts.append(fact.size - small if isinstance(fact, Window) else None)
    if facts == [None, None]:
        return Causal()
    if facts[0] is None or facts[0] != facts[1]:
        return Miss(f"the mask does not scale with its constant {long[0]}")
    return Window(long[0] + facts[0])


def _prove_by_value(graph: Graph, probe: fx.GraphModule, mask: fx.Node, beyond: int) -> Mask | Miss:
    """The one family that the probe agrees with at two lengths past `beyond`."""
    device = graph.input("input_ids").meta["val"].device
    facts = [
        _fit(_seen(_evaluate(probe, rows, device)), rows) for rows in (beyond + 13, beyond + 24)
    ]
    for fact in facts:
        if isinstance(fact, Miss):
            return Miss(f"{fact.reason} (mask {mask.name})")
    if facts[0] != facts[1]:
        return Miss(f"the mask is {facts[0]} at {beyond + 13} rows and {facts[1]} at {beyond + 24}")
    return facts[0]


def _evaluate(probe: fx.GraphModule, rows: int, device: torch.device) -> Tensor:
    """The mask for two unpadded rows of `rows` tokens."""
    positions = torch.arange(rows, device=device).expand(2, rows).contiguous()
    with torch.no_grad():
        return probe(torch.zeros_like(positions), positions)[0]


def _seen(mask: Tensor) -> Tensor | Miss:
    """The mask as booleans [S, S], if it is the same for every row of the batch and every head."""
    if mask.dtype is not torch.bool:
        # some models divide scores and masks alike: what is left still hides everything
        hidden = mask <= torch.finfo(mask.dtype).min / 64
        if not bool((hidden | (mask == 0)).all()):
            return Miss("the mask adds a bias that is neither 0 nor minus infinity")
        mask = ~hidden
    first = mask[:1, :1]
    if not bool((mask == first).all()):
        return Miss("the mask differs between heads or rows of the batch")
    return first[0, 0]


def _fit(seen: Tensor | Miss, rows: int) -> Mask | Miss:
    """Causal or a causal window, exactly; nothing is assumed."""
    if isinstance(seen, Miss):
        return seen
    if tuple(seen.shape) != (rows, rows):
        return Miss(f"the mask is {list(seen.shape)} where rows x keys is [{rows}, {rows}]")
    index = torch.arange(rows, device=seen.device)
    distance = index[:, None] - index
    causal = distance >= 0
    if torch.equal(seen, causal):
        return Causal()
    size = int(seen[-1].sum())
    if size and torch.equal(seen, causal & (distance < size)):
        return Window(size)
    return Miss("the mask is neither causal nor a causal window")


def _constants(graph: Graph, nodes: set[fx.Node]) -> set[int]:
    """Every number in the mask's sub-graph, in arguments or tensors: none may hide a window."""
    found = set()
    for node in nodes:
        for leaf in pytree.tree_leaves((node.args, node.kwargs)):
            found.add(_length(leaf))
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(graph.module)
            found.add(max(value.shape) if value.numel() > 1 else _length(value.item()))
    return found - {0}


def _length(value: object) -> int:
    """The window that a number may stand for: itself, or its inverse if it is a factor."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value:
        return 0
    size = abs(value) if abs(value) >= 1 else 1 / abs(value)
    return 0 if size > HUGE or size in LOWEST else math.ceil(size)


def _short_windows(graph: Graph) -> tuple[int, ...]:
    return tuple(window for window in graph.windows if window <= LONGEST)


def _scaled(args: tuple[Argument, ...], value: int, small: int) -> tuple[Argument, ...]:
    """The operands of a node with `small` in the place of `value`, and its sign."""

    def scaled(arg: object) -> object:
        if isinstance(arg, (int, float)) and not isinstance(arg, bool) and abs(arg) == value:
            return small if arg > 0 else -small
        return arg

    return cast(tuple[Argument, ...], pytree.tree_map(scaled, args))
