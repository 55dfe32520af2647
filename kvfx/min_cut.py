"""The lightest nodes of a directed graph that separate some of its nodes from others."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)
# what edges carry, and nodes that cannot be cut
INFINITE = 1 << 62
# ends of edges: a node is an edge of its weight, from "in" to "out"
Rooms = dict[Hashable, dict[Hashable, int]]
SOURCE, SINK = "source", "sink"


def least_cut(
    weights: Mapping[Node, int],
    edges: Iterable[tuple[Node, Node]],
    sources: Iterable[Node],
    sinks: Iterable[Node],
) -> set[Node]:
    """The nodes of least total weight that every path from `sources` to `sinks` (ends included)
    goes through; of several such sets the nearest to the sinks. Edmonds-Karp.
    """
    room: Rooms = defaultdict(lambda: defaultdict(int))
    for node, weight in weights.items():
        room[node, "in"][node, "out"] = weight
    for one, other in edges:
        room[one, "out"][other, "in"] = INFINITE
    for node in sources:
        room[SOURCE][node, "in"] = INFINITE
    for node in sinks:
        room[node, "out"][SINK] = INFINITE
    while path := _path(room):
        least = min(room[one][other] for one, other in path)
        if least == INFINITE:
            break
        for one, other in path:
            room[one][other] -= least
            room[other][one] += least
    behind = _behind(room)
    return {node for node in weights if (node, "out") in behind and (node, "in") not in behind}


def _path(room: Rooms) -> list[tuple[Hashable, Hashable]]:
    """A shortest way from the source to the sink along which something fits, or nothing."""
    came: dict[Hashable, Hashable] = {SOURCE: SOURCE}
    todo: deque[Hashable] = deque(came)
    while todo and SINK not in came:
        one = todo.popleft()
        for other, left in room[one].items():
            if left > 0 and other not in came:
                came[other] = one
                todo.append(other)
    path, at = [], SINK
    while came.get(at, at) != at:
        path.append((came[at], at))
        at = came[at]
    return path


def _behind(room: Rooms) -> set[Hashable]:
    """From where something still fits to the sink."""
    into: dict[Hashable, list[Hashable]] = defaultdict(list)
    for one, others in room.items():
        for other, left in others.items():
            if left > 0:
                into[other].append(one)
    found: set[Hashable] = {SINK}
    todo: list[Hashable] = [SINK]
    while todo:
        for one in into[todo.pop()]:
            if one not in found:
                found.add(one)
                todo.append(one)
    return found
