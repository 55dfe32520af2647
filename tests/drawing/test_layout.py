"""Where boxes stand: they do not overlap, edges run downwards, the layout is always the same."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfx.drawing.boxes import Box, Drawing, Edge
from kvfx.drawing.columns import _apart
from kvfx.drawing.layout import lay_out


@st.composite
def drawings(draw):
    """Acyclic drawings of up to 12 boxes."""
    count = draw(st.integers(1, 12))
    names = st.text("abcdefgh", min_size=1, max_size=20)
    boxes = tuple(Box("kvfx", draw(names), draw(names | st.just(""))) for _ in range(count))
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=20)) if pairs else []
    return Drawing(boxes, tuple(Edge(a, b, "k" if a % 2 else "") for a, b in edges))


@given(drawings())
def test_boxes_do_not_overlap(drawing):
    for one, other in itertools.combinations(lay_out(drawing).places, 2):
        apart_x = abs(one.x - other.x) >= (one.width + other.width) / 2 - 1e-6
        apart_y = abs(one.y - other.y) >= (one.height + other.height) / 2 - 1e-6
        assert apart_x or apart_y


@given(drawings())
def test_everything_lies_within_the_picture(drawing):
    layout = lay_out(drawing)
    for place in layout.places:
        assert place.x - place.width / 2 >= 0
        assert place.x + place.width / 2 <= layout.width
        assert 0 <= place.y - place.height / 2 <= place.y + place.height / 2 <= layout.height
    assert all(0 <= x <= layout.width for path in layout.paths for x, _ in path)


@given(drawings())
def test_edges_run_downwards_from_box_to_box(drawing):
    layout = lay_out(drawing)
    for edge, path in zip(drawing.edges, layout.paths, strict=True):
        heights = [y for _, y in path]
        assert heights == sorted(heights)
        source, target = layout.places[edge.source], layout.places[edge.target]
        assert path[0] == (source.x, source.y + source.height / 2)
        assert path[-1][1] == target.y - target.height / 2
        assert abs(path[-1][0] - target.x) <= target.width / 2


@given(drawings())
def test_the_layout_is_a_function(drawing):
    assert lay_out(drawing) == lay_out(drawing)


def test_nothing_is_laid_out_as_nothing():
    layout = lay_out(Drawing((), ()))
    assert layout.places == ()


@pytest.mark.parametrize(
    ("wanted", "weights", "gaps", "places"),
    [
        ([0, 10], [1, 1], [5], [0, 10]),
        ([0, 0], [1, 1], [10], [-5, 5]),
        ([0, 0], [3, 1], [8], [-2, 6]),
        ([5, 0, 0], [1, 1, 1], [1, 1], [2 / 3, 5 / 3, 8 / 3]),
        ([7], [1], [], [7]),
    ],
)
def test_places_that_keep_their_distance(wanted, weights, gaps, places):
    assert _apart(wanted, weights, gaps) == pytest.approx(places)
