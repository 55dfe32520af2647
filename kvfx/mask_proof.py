"""The proof of a mask: its own sub-graph, run at lengths beyond every constant in it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, fx
from torch.fx.node import Argument
from torch.utils import _pytree as pytree

from kvfx.constants import tensor_of
from kvfx.geometry import Chunk, Mask, Window
from kvfx.graph import Graph, Miss, ancestors, extract
from kvfx.visibility import MaskFact, agree, fit_mask

aten = torch.ops.aten
SHORTEST = 37
# masks are evaluated at S x S; a longer window is proven with its constant scaled down
LONGEST = 6000
# beyond: the end of a slice, the smallest number of a dtype
HUGE = 2**30
LOWEST = {torch.finfo(torch.float16).max}
SIZES = {aten.sym_size.int}


def prove_mask(graph: Graph, mask: fx.Node) -> MaskFact | Miss:
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


def _prove_scaled(graph: Graph, mask: fx.Node, long: list[int]) -> MaskFact | Miss:
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
        if isinstance(fact, Miss):
            return fact
        facts.append(replace(fact, seen=_resized(fact.seen, long[0] - small)))
    if not agree(*facts):
        return Miss(f"the mask does not scale with its constant {long[0]}")
    return facts[0]


def _resized(seen: Mask, more: int) -> Mask:
    """The same family with `more` positions in sight."""
    return type(seen)(seen.size + more) if isinstance(seen, (Window, Chunk)) else seen


def _prove_by_value(
    graph: Graph, probe: fx.GraphModule, mask: fx.Node, beyond: int
) -> MaskFact | Miss:
    """The one family that the probe agrees with at two lengths past `beyond`."""
    input_ids = graph.input("input_ids").meta["val"]
    longest = min(beyond + 24, _bound(input_ids.shape[1]))
    try:
        facts = _facts(probe, (longest - 11, longest), input_ids.device)
    except RuntimeError:
        # a table bounds the length: the model itself shows no window beyond it
        longest = beyond
        facts = _facts(probe, (longest - 11, longest), input_ids.device)
    near, far = facts
    for fact in facts:
        if isinstance(fact, Miss):
            return Miss(f"{fact.reason} (mask {mask.name})")
    assert not isinstance(near, Miss)
    assert not isinstance(far, Miss)
    if not agree(near, far):
        return Miss(f"the mask is {near} at {longest - 11} rows, {far} at {longest}")
    return far


def _facts(
    probe: fx.GraphModule, lengths: tuple[int, int], device: torch.device
) -> list[MaskFact | Miss]:
    return [fit_mask(_evaluate(probe, rows, device), rows) for rows in lengths]


def _bound(size: int | torch.SymInt) -> int:
    """The longest that a size may be, as export found."""
    if not isinstance(size, torch.SymInt):
        return size
    upper = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(upper) if upper.is_Integer else HUGE


def _evaluate(probe: fx.GraphModule, rows: int, device: torch.device) -> Tensor:
    """The mask for two unpadded rows of `rows` tokens."""
    positions = torch.arange(rows, device=device).expand(2, rows).contiguous()
    with torch.no_grad():
        return probe(torch.zeros_like(positions), positions)[0]


def _constants(graph: Graph, nodes: set[fx.Node]) -> set[int]:
    """Every number in the mask's sub-graph, in arguments or tensors: none may hide a window."""
    found = set()
    for node in nodes:
        for leaf in pytree.tree_leaves((node.args, node.kwargs)):
            found.add(_length(leaf))
        if node.op == "get_attr":
            value = tensor_of(graph, node)
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
