"""Where boxes and edges stand: ranks from top to bottom, few crossings, straight lines.

The layered drawing of Sugiyama: ranks by longest path, orders by barycentres, places by least
squares under the distances that boxes keep.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from kvfx.drawing.boxes import Box, Drawing
from kvfx.drawing.columns import columns, neighbours

# pixels
TITLE, SUBTITLE, LABEL = 7.5, 6.3, 6.2
PADDING, LEAST = 24, 44
HIGH, LOW = 42, 28
BETWEEN_RANKS = 34
MARGIN = 14
SWEEPS = 12


@dataclass(frozen=True)
class Place:
    """The centre and the size of a box, in pixels."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Layout:
    """The place of each box, the points of each edge from top to bottom, and the size of it all."""

    places: tuple[Place, ...]
    paths: tuple[tuple[tuple[float, float], ...], ...]
    width: float
    height: float


def lay_out(drawing: Drawing) -> Layout:
    """The layout of a drawing, the same at every call."""
    edges = [(edge.source, edge.target) for edge in drawing.edges]
    ranks = _ranks(len(drawing.boxes), edges)
    sizes = [_size(box, _labels(drawing, number)) for number, box in enumerate(drawing.boxes)]
    # an edge that passes ranks has a point in each of them
    chains = []
    for source, target in edges:
        between = range(ranks[source] + 1, ranks[target])
        chains.append([source, *range(len(ranks), len(ranks) + len(between)), target])
        ranks.extend(between)
        sizes.extend([(0.0, 0.0)] * len(between))
    links = [pair for chain in chains for pair in itertools.pairwise(chain)]
    rows = _ordered(ranks, links)
    for row in rows:
        # a long edge is upright beside the boxes of a rank
        high = max(sizes[box][1] for box in row)
        sizes = [
            (0.0, high) if box in row and not size[0] else size for box, size in enumerate(sizes)
        ]
    xs = columns(rows, links, [width for width, _ in sizes], len(drawing.boxes))
    ys = _heights(rows, sizes)
    left = min((x - width / 2 for x, (width, _) in zip(xs, sizes, strict=True)), default=0) - MARGIN
    places = [Place(xs[i] - left, ys[i], *sizes[i]) for i in range(len(sizes))]
    paths = _paths(places, chains, [len(edge.label) for edge in drawing.edges])
    boxes = places[: len(drawing.boxes)]
    return Layout(
        tuple(boxes),
        tuple(paths),
        max((place.x + place.width / 2 for place in places), default=0) + MARGIN,
        max((place.y + place.height / 2 for place in boxes), default=0) + MARGIN,
    )


def _labels(drawing: Drawing, number: int) -> int:
    """Characters of the labels of the edges that end at a box."""
    return sum(len(edge.label) + 2 for edge in drawing.edges if edge.target == number)


def _size(box: Box, labels: int) -> tuple[float, float]:
    """Width and height that the words of a box, and the labels above it, need."""
    words = max(len(box.title) * TITLE, len(box.subtitle) * SUBTITLE, labels * LABEL)
    if box.kind == "join":
        return float(LOW), float(LOW)
    return max(words + PADDING, LEAST), float(HIGH if box.subtitle else LOW)


def _ranks(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """The rank of each box: below all that it reads; what reads nothing stands just above its
    first reader.
    """
    ranks = [0] * count
    for _ in range(count):
        before = list(ranks)
        for source, target in edges:
            ranks[target] = max(ranks[target], ranks[source] + 1)
        if ranks == before:
            break
    targets = {target for _, target in edges}
    for box in range(count):
        readers = [ranks[target] for source, target in edges if source == box]
        if box not in targets and readers:
            ranks[box] = min(readers) - 1
    return ranks


def _ordered(ranks: list[int], links: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The boxes of each rank from left to right, ordered by the mean of their neighbours."""
    rows: list[list[int]] = [[] for _ in range(max(ranks, default=-1) + 1)]
    for box, rank in enumerate(ranks):
        rows[rank].append(box)
    above, below = neighbours(len(ranks), links)
    best, fewest = [list(row) for row in rows], _crossings(rows, below)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else rows[::-1]:
            place = {box: index for other in rows for index, box in enumerate(other)}
            near = above if down else below
            mean = {
                box: sum(place[other] for other in near[box]) / len(near[box])
                if near[box]
                else place[box]
                for box in row
            }
            row.sort(key=mean.__getitem__)
        crossings = _crossings(rows, below)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _crossings(rows: Sequence[Sequence[int]], below: Sequence[Sequence[int]]) -> int:
    place = {box: index for row in rows for index, box in enumerate(row)}
    count = 0
    for row in rows:
        ends = [(place[box], place[other]) for box in row for other in below[box]]
        count += sum(a < c and b > d for a, b in ends for c, d in ends)
    return count


def _heights(rows: Sequence[Sequence[int]], sizes: Sequence[tuple[float, float]]) -> list[float]:
    ys, top = [0.0] * len(sizes), float(MARGIN)
    for row in rows:
        height = max(sizes[box][1] for box in row)
        for box in row:
            ys[box] = top + height / 2
        top += height + BETWEEN_RANKS
    return ys


def _paths(
    places: Sequence[Place], chains: Sequence[Sequence[int]], labels: Sequence[int]
) -> list[tuple[tuple[float, float], ...]]:
    """From the bottom of the first box over the points between to the top of the last, where edges
    end side by side, each with room for its label.
    """
    ports: dict[int, float] = {}
    for box in {chain[-1] for chain in chains}:
        ending = [edge for edge, chain in enumerate(chains) if chain[-1] == box]
        ending.sort(key=lambda edge: (places[chains[edge][-2]].x, edge))
        share = places[box].width / sum(labels[edge] + 2 for edge in ending)
        left = places[box].x - places[box].width / 2
        for edge in ending:
            room = share * (labels[edge] + 2)
            alone = len(ending) == 1
            ports[edge] = left + (room if alone else max(room - LABEL * labels[edge], 8)) / 2
            left += room
    paths = []
    for edge, chain in enumerate(chains):
        first, last = places[chain[0]], places[chain[-1]]
        points = [(places[box].x, places[box].y, places[box].height / 2) for box in chain[1:-1]]
        paths.append(
            (
                (first.x, first.y + first.height / 2),
                *((x, y + side) for x, y, half in points for side in (-half, half)),
                (ports[edge], last.y - last.height / 2),
            )
        )
    return paths
