"""The minimum cut, against every set of nodes."""

from __future__ import annotations

import itertools
import random

import pytest

from kvfx.min_cut import INFINITE, least_cut


def separates(cut, edges, sources, sinks) -> bool:
    """Whether no path avoids the cut."""
    seen, todo = set(), [node for node in sources if node not in cut]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        todo += [other for one, other in edges if one == node and other not in cut]
    return not seen & set(sinks)


@pytest.mark.parametrize("seed", range(60))
def test_no_set_is_lighter(seed):
    draw = random.Random(seed)
    nodes = list(range(8))
    edges = [pair for pair in itertools.combinations(nodes, 2) if draw.random() < 0.35]
    weights = {node: draw.choice([1, 2, 3, 5, INFINITE]) for node in nodes}
    sources, sinks = [0, 1], [6, 7]
    # ends can always be cut
    weights |= {node: draw.randint(4, 9) for node in sinks}
    found = least_cut(weights, edges, sources, sinks)
    assert separates(found, edges, sources, sinks)
    sets = (set(cut) for size in range(9) for cut in itertools.combinations(nodes, size))
    valid = [cut for cut in sets if separates(cut, edges, sources, sinks)]
    assert sum(map(weights.__getitem__, found)) == min(
        sum(map(weights.__getitem__, cut)) for cut in valid
    )


def test_the_nearest_of_equals():
    edges = [("a", "b"), ("b", "c"), ("c", "d")]
    weights = {"a": 2, "b": 2, "c": 2, "d": 5}
    assert least_cut(weights, edges, ["a"], ["d"]) == {"c"}


def test_a_node_that_is_both_ends_is_cut():
    assert least_cut({"a": 3, "b": 1}, [], ["a"], ["a", "b"]) == {"a"}
