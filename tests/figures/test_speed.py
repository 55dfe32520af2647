"""From which context on a cache pays."""

from __future__ import annotations

import pytest

from kvfx.figures import canvas, speed

pytest.importorskip("matplotlib", reason="pip install matplotlib")


@pytest.mark.parametrize(
    ("pairs", "measured", "interpolated"),
    [
        # 3 more at 1,000, 1 less at 2,000: three quarters of the way
        ([(1000, 13.0, 10.0), (2000, 19.0, 20.0)], 2000, 1750.0),
        # equal is not less
        ([(1000, 10.0, 10.0), (2000, 19.0, 20.0)], 2000, 1000.0),
        # less at the shortest: nothing to interpolate with
        ([(1000, 9.0, 10.0), (2000, 19.0, 20.0)], 1000, None),
        # less, more, less: only the last crossing counts
        ([(1000, 9.0, 10.0), (2000, 21.0, 20.0), (4000, 39.0, 40.0)], 4000, 3000.0),
    ],
)
def test_break_even(pairs, measured, interpolated):
    found = speed.break_even(pairs)
    assert found["measured"] == measured
    assert found["interpolated"] == interpolated
    assert found["shortest"] == (interpolated is None)


@pytest.mark.parametrize("pairs", [[], [(1000, 9.0, 10.0), (2000, 20.0, 20.0)]])
def test_no_break_even(pairs):
    assert speed.break_even(pairs) is None
    assert speed.said(None) == "at no context measured of both"


def test_break_even_in_words():
    assert speed.said(speed.break_even([(512, 1.0, 2.0)])) == "from 512 or less"
    found = speed.break_even([(1000, 13.0, 10.0), (2000, 19.0, 20.0)])
    assert speed.said(found) == "from 2,000 (interpolated: 1,750)"


def test_data_are_the_rows(rows):
    data = speed.data("tiny", "a CPU", rows)
    small = data["contenders"][1]
    assert [point["ms"] for point in small["points"]] == [13.0, 19.0, 30.0]
    assert [point["bytes"] for point in small["points"]] == [150] * 3
    assert small["faster"] == {"measured": 2000, "interpolated": 1750.0, "shortest": False}
    assert small["smaller"] == {"measured": 2000, "interpolated": 1500.0, "shortest": False}
    full = data["contenders"][2]
    assert full["faster"]["shortest"]
    assert full["smaller"] is None
    assert data["contenders"][3]["points"] == []
    assert data["contenders"][3]["refused"] == {1000: "wrong: logits are not finite"}


def test_rings_are_on_the_dense_line(rows):
    figure = speed.draw(speed.data("tiny", "a CPU", rows))
    rings = [
        line for line in figure.axes[0].lines if line.get_marker() == "o" and line.get_zorder() == 4
    ]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in rings] == [(1750.0, 17.5)]


def test_without_a_dense_row_nothing_is_compared(rows):
    others = [row for row in rows if row.contender != "HF default"]
    data = speed.data("tiny", "a CPU", others)
    assert all(one["faster"] is None for one in data["contenders"])
    colours = {line.get_color() for line in speed.draw(data).axes[0].lines}
    assert canvas.INK not in colours
