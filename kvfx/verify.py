"""What a graph of each level promises, as tables; checked after every pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from kvfx.errors import VerificationError
from kvfx.graph import Graph, Level
from kvfx.op_table import BACKENDS
from kvfx.ops import backend_of, name_of
from kvfx.provenance import origin

Row = tuple[Callable[[fx.Node], bool], Callable[[fx.Node], bool], str]


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function"


def _is_kvfx(node: fx.Node) -> bool:
    return _is_call(node) and name_of(node.target) is not None


def _is_named(name: str) -> Callable[[fx.Node], bool]:
    return lambda node: _is_call(node) and name_of(node.target) == name


def _is_assert(node: fx.Node) -> bool:
    return _is_call(node) and "assert" in str(node.target)


def _never(_: fx.Node) -> bool:
    return False


def _has_value(node: fx.Node) -> bool:
    return "val" in node.meta


def _is_abstract(node: fx.Node) -> bool:
    return backend_of(node.target) == "default"


def _names_backend(node: fx.Node) -> bool:
    return backend_of(node.target) in BACKENDS


def _is_stamped(node: fx.Node) -> bool:
    return origin(node) is not None


CAPTURED: tuple[Row, ...] = (
    (lambda node: node.op == "placeholder", _has_value, "an input has no fake value"),
    (
        lambda node: node.op == "call_method",
        _never,
        "a method call is left: capture gives functions only",
    ),
)
CANONICAL: tuple[Row, ...] = (
    *CAPTURED,
    (_is_assert, _never, "an assertion is left: it would keep dead code alive"),
    (
        lambda node: node.op == "call_module",
        _never,
        "a sub-module call is left: it must be inlined",
    ),
)
STAMPED: tuple[Row, ...] = (
    (_is_kvfx, _is_stamped, "a kvfx node has no stamp: create it through kvfx.graph.call"),
    (_is_kvfx, _has_value, "a kvfx node has no fake value: create it through kvfx.graph.call"),
)
ABSTRACT: tuple[Row, ...] = (
    (_is_kvfx, _is_abstract, "a backend is named before select-backend ran"),
)
RAISED: tuple[Row, ...] = (*CANONICAL, *STAMPED, *ABSTRACT)
CACHED: tuple[Row, ...] = (
    *CANONICAL,
    *STAMPED,
    *ABSTRACT,
    (
        _is_named("attention"),
        _never,
        "an attention node has no cache: insert-cache must rewrite every site",
    ),
)
LOWERED: tuple[Row, ...] = (
    *STAMPED,
    (_is_kvfx, _names_backend, "a kvfx op names no backend"),
    (
        _is_named("attention"),
        _never,
        "an attention node has no cache: insert-cache must rewrite every site",
    ),
)
LEVELS: dict[Level, tuple[Row, ...]] = {
    Level.CAPTURED: CAPTURED,
    Level.CANONICAL: CANONICAL,
    Level.RAISED: RAISED,
    Level.CACHED: CACHED,
    Level.LOWERED: LOWERED,
}


def verify(graph: Graph, *, after: str) -> None:
    """Raise a VerificationError naming the pass, the node and the rule unless `graph` keeps its
    level's promises.
    """
    graph.module.graph.lint()
    for node in graph.nodes:
        for applies, holds, message in LEVELS[graph.level]:
            if applies(node) and not holds(node):
                raise VerificationError(
                    f"after {after} ({graph.level.value}): {message}\n  at {node.format_node()}"
                )
    if graph.level is Level.RAISED:
        _verify_masks(graph, after)
    if graph.level is Level.CACHED:
        _verify_buffers(graph, after)


def _verify_masks(graph: Graph, after: str) -> None:
    """Every raised attention that was understood decides visibility from positions, not from a mask
    tensor.
    """
    sites = {site.name for site in graph.sites}
    for node in graph.calls(torch.ops.kvfx.attention.default):
        mark = origin(node)
        if mark is not None and mark.site in sites - set(graph.missed) and node.args[3] is not None:
            raise VerificationError(
                f"after {after}: {mark.site} still has a mask tensor at {node.format_node()}"
            )


def _verify_buffers(graph: Graph, after: str) -> None:
    """No buffer is used by two sites, unless one has the keys and values of the other."""
    owners = {x.name: x.name if x.reads is None else graph.sites[x.reads].name for x in graph.sites}
    for node in graph.nodes:
        if node.op != "placeholder" or not str(node.target).startswith("site_"):
            continue
        marks = [mark for user in node.users if (mark := origin(user)) is not None]
        users = {owners.get(mark.site, mark.site) for mark in marks}
        if len(users) > 1:
            raise VerificationError(
                f"after {after}: buffer {node.target} is shared by {', '.join(sorted(users))}"
            )
