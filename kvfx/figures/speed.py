"""Time per token and bytes of the cache against the context, and from where on a cache pays."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvfx.bench.contenders import HF_DEFAULT
from kvfx.bench.decode import Row
from kvfx.figures import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEBIBYTE = 2**20
# inches
SIZE = (4.1, 2.8)
# pieces of a line between two points
STEPS = 24
MEASURES = {"faster": "ms", "smaller": "bytes"}


def data(model: str, device: str, rows: Sequence[Row]) -> dict:
    """What is drawn of the rows of `kvfx bench decode`: per contender its points, and from which
    context on it is `faster` and `smaller` than the dense cache of HF's default (see
    `break_even`).
    """
    dense = _points(rows, HF_DEFAULT)
    contenders = []
    for name in dict.fromkeys(row.contender for row in rows):
        points = _points(rows, name)
        found = {
            word: None if name == HF_DEFAULT else break_even(_pairs(points, dense, key))
            for word, key in MEASURES.items()
        }
        refused = {row.length: row.refusal for row in rows if row.contender == name and row.refusal}
        contenders.append({"name": name, "points": points, **found, "refused": refused})
    return {
        "figure": "speed",
        "model": model,
        "device": device,
        "dense": HF_DEFAULT,
        "contenders": contenders,
    }


def break_even(pairs: Sequence[tuple[int, float, float]]) -> dict | None:
    """From which context on a contender has less than the dense cache: `pairs` are context, its
    value, and the dense one, shortest first.

    `measured` is the smallest context that was measured from which on all longer ones are less;
    `interpolated` is where two straight lines from the context before cross, None where there is
    none before (`shortest` is then True). None if the longest context is not less.
    """
    start = len(pairs)
    while start > 0 and pairs[start - 1][1] < pairs[start - 1][2]:
        start -= 1
    if start == len(pairs):
        return None
    at, own, dense = pairs[start]
    if start == 0:
        return {"measured": at, "interpolated": None, "shortest": True}
    before, own_before, dense_before = pairs[start - 1]
    more, less = own_before - dense_before, dense - own
    crossing = before + (at - before) * more / (more + less)
    return {"measured": at, "interpolated": crossing, "shortest": False}


def said(found: dict | None) -> str:
    """A break-even in words."""
    if found is None:
        return "at no context measured of both"
    if found["shortest"]:
        return f"from {found['measured']:,} or less"
    return f"from {found['measured']:,} (interpolated: {found['interpolated']:,.0f})"


def draw(data: dict) -> Figure:
    """The picture of that data; a ring marks where a line passes the dense one."""
    canvas.need_matplotlib("speed")
    from matplotlib.lines import Line2D

    contenders = [contender for contender in data["contenders"] if contender["points"]]
    names = [contender["name"] for contender in contenders if contender["name"] != data["dense"]]
    pens = {name: canvas.pen(number) for number, name in enumerate(names)}
    if len(names) < len(contenders):
        pens = {data["dense"]: canvas.Pen(canvas.INK, "", canvas.DENSE), **pens}
    ring = Line2D([], [], color=canvas.INK, marker="o", fillstyle="none", linestyle="", ms=9)
    entries = [
        *((name, Line2D([], [], color=pen.colour, marker=pen.marker, linestyle=pen.dash))
          for name, pen in pens.items()),
        ("passes the dense one (interpolated)", ring),
    ]  # fmt: skip
    more = canvas.legend_inches(2 * SIZE[0], [name for name, _ in entries])
    with canvas.look():
        figure, grid = canvas.panels(2, 2, SIZE, more)
        for axes, (word, key) in zip(grid, MEASURES.items(), strict=True):
            for contender in contenders:
                _draw_line(axes, contender, key, pens[contender["name"]])
                _draw_ring(axes, contender, data, word, key)
            _scale(axes, contenders, key)
        canvas.titled(grid[0], "time per token, ms", "median, and from p25 to p75")
        canvas.titled(grid[1], "cache, MiB", "log scale")
        canvas.legend(figure, entries)
    return figure


def _points(rows: Sequence[Row], name: str) -> list[dict]:
    """What was timed of a contender, shortest first."""
    timed = [row for row in rows if row.contender == name and row.median_ms is not None]
    return [
        {
            "length": row.length,
            "ms": row.median_ms,
            "p25": row.p25_ms,
            "p75": row.p75_ms,
            "bytes": row.cache_bytes,
        }
        for row in sorted(timed, key=lambda row: row.length)
    ]


def _pairs(
    points: Sequence[dict], dense: Sequence[dict], key: str
) -> list[tuple[int, float, float]]:
    """Contexts at which both were measured."""
    known = {point["length"]: point[key] for point in dense}
    return [
        (point["length"], point[key], known[point["length"]])
        for point in points
        if point["length"] in known
    ]


def _draw_line(axes: Axes, contender: dict, key: str, pen: canvas.Pen) -> None:
    points, above = contender["points"], 3 if pen.marker == "" else 2
    x, y = _between(points, key)
    axes.plot(x, y, color=pen.colour, linestyle=pen.dash, zorder=above)
    x = [point["length"] for point in points]
    y = [_drawn(point[key], key) for point in points]
    axes.plot(x, y, color=pen.colour, marker=pen.marker, linestyle="", clip_on=False)
    if key == "ms":
        for point in points:
            ends = [point["p25"], point["p75"]]
            axes.plot([point["length"]] * 2, ends, color=pen.colour, linewidth=0.9, alpha=0.6)


def _between(points: Sequence[dict], key: str) -> tuple[list[float], list[float]]:
    """Straight lines between points, which an axis with a log scale bends."""
    x, y = [points[0]["length"]], [_drawn(points[0][key], key)]
    for low, high in itertools.pairwise(points):
        for step in range(1, STEPS + 1):
            part = step / STEPS
            x.append(low["length"] + (high["length"] - low["length"]) * part)
            y.append(_drawn(low[key] + (high[key] - low[key]) * part, key))
    return x, y


def _draw_ring(axes: Axes, contender: dict, data: dict, word: str, key: str) -> None:
    """A ring around the crossing, on the dense line."""
    found = contender[word]
    if found is None or found["interpolated"] is None:
        return
    dense = next(one for one in data["contenders"] if one["name"] == data["dense"])["points"]
    at = found["interpolated"]
    after = next(index for index, point in enumerate(dense) if point["length"] >= at)
    low, high = dense[max(after - 1, 0)], dense[after]
    part = (at - low["length"]) / max(high["length"] - low["length"], 1)
    value = low[key] + (high[key] - low[key]) * part
    axes.plot(at, _drawn(value, key), color=canvas.INK, marker="o", fillstyle="none", ms=9,
              zorder=4)  # fmt: skip


def _drawn(value: float, key: str) -> float:
    return value / MEBIBYTE if key == "bytes" else value


def _scale(axes: Axes, contenders: Sequence[dict], key: str) -> None:
    lengths = sorted({point["length"] for one in contenders for point in one["points"]})
    axes.set_xscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("context, tokens")
    if key == "bytes":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
