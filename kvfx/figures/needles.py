"""Where answers are found: the rate by depth and length, a panel per policy."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvfx.errors import InputError
from kvfx.eval.answers import CEILING, Retrieval
from kvfx.eval.results import Measurement
from kvfx.eval.table import DENSE
from kvfx.figures import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# their answer is everywhere, or always early
WITHOUT_DEPTH = ("cwe", "fwe", "json")
# inches: of a panel, what a length and a depth add, and the least
MORE, CELL, LEAST, COLUMNS = (0.75, 0.85), (0.62, 0.28), 2.1, 4
# letters of a policy above its panel
LETTERS = 12.0
# above this rate, dark text is read better
BRIGHT = 0.55


def data(measurements: Sequence[Measurement]) -> dict:
    """What is drawn of measurements of one model at one task: per policy, rows of cells
    `{"samples", "rate"}` by depth and length, None where nothing was measured.

    Raises InputError for a task without depths.
    """
    first = measurements[0].setting
    if first.task in WITHOUT_DEPTH or not isinstance(measurements[0].scores, Retrieval):
        raise InputError(f"{first.task}: its answers have no depth to draw: choose a needle task")
    lengths = sorted({found.setting.length for found in measurements})
    cells: dict[str, dict[tuple[float, int], list[float]]] = {}
    for found in measurements:
        assert isinstance(found.scores, Retrieval)
        rows = cells.setdefault(found.label, defaultdict(list))
        for depth, hit in zip(found.scores.depths, found.scores.hits, strict=True):
            rows[depth, found.setting.length].append(float(hit))
    depths = sorted({depth for rows in cells.values() for depth, _ in rows})
    return {
        "figure": "needles",
        "model": first.model,
        "task": first.task,
        "lengths": lengths,
        "depths": depths,
        "below_ceiling": _below(measurements),
        "policies": [
            {
                "label": label,
                "cells": [[_cell(rows.get((depth, size))) for size in lengths] for depth in depths],
            }
            for label, rows in cells.items()
        ],
    }


def draw(data: dict) -> Figure:
    """The picture of that data; of one length, a row per policy says it all."""
    one, note = len(data["lengths"]) == 1, bool(data["below_ceiling"])
    titles, size = ([""], _single(data)) if one else _titles(data)
    with canvas.look():
        figure, grid = canvas.panels(len(titles), COLUMNS, size, 0.25 * note)
        if one:
            _draw_single(grid[0], data)
        for at, (axes, title) in enumerate(zip(grid, titles, strict=True) if not one else ()):
            _draw_cells(axes, data["policies"][at]["cells"])
            _name(axes, [_percent(depth) for depth in data["depths"]], _lengths(data))
            axes.set_title(title, fontsize=8.5)
            axes.set_xlabel("tokens")
            axes.set_ylabel("depth" if at % COLUMNS == 0 else "")
        if note:
            text = f"* below ceiling: dense answers less than {CEILING:.0%}, so nobody is ranked"
            figure.supxlabel(text, fontsize=8, color=canvas.QUIET, x=0.01, ha="left")
    return figure


def _titles(data: dict) -> tuple[list[str], tuple[float, float]]:
    """Policies on at most two lines, and the inches of their panels."""
    wide = max(LEAST, MORE[0] + CELL[0] * len(data["lengths"]))
    letters = int((wide - MORE[0]) * LETTERS)
    titles = [
        "\n".join(textwrap.wrap(policy["label"], letters, max_lines=2, placeholder=" …"))
        for policy in data["policies"]
    ]
    lines = max(title.count("\n") + 1 for title in titles)
    return titles, (wide, MORE[1] + CELL[1] * len(data["depths"]) + 0.14 * lines)


def _single(data: dict) -> tuple[float, float]:
    """The inches of a panel with a row per policy."""
    longest = max(len(canvas.shortened(policy["label"])) for policy in data["policies"])
    wide = 0.4 + canvas.LETTER * longest + CELL[0] * len(data["depths"])
    return wide, MORE[1] + CELL[1] * len(data["policies"])


def _draw_single(axes: Axes, data: dict) -> None:
    policies = data["policies"]
    _draw_cells(axes, [[line[0] for line in policy["cells"]] for policy in policies])
    depths = [_percent(depth) for depth in data["depths"]]
    _name(axes, [canvas.shortened(policy["label"]) for policy in policies], depths)
    axes.set_xlabel(f"depth, {_lengths(data)[0]} tokens")


def _below(measurements: Sequence[Measurement]) -> list[int]:
    """The lengths at which the dense model itself answers too little."""
    dense = [found for found in measurements if found.setting.policy == DENSE]
    return [found.setting.length for found in dense
            if isinstance(found.scores, Retrieval) and found.scores.below_ceiling]  # fmt: skip


def _cell(hits: list[float] | None) -> dict | None:
    return None if not hits else {"samples": len(hits), "rate": sum(hits) / len(hits)}


def _draw_cells(axes: Axes, cells: list[list[dict | None]]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    colours = colormaps["cividis"]
    for row, line in enumerate(cells):
        for column, cell in enumerate(line):
            place = (column - 0.5, row - 0.5)
            if cell is None:
                empty = Rectangle(place, 1, 1, facecolor="none", edgecolor=canvas.LINE, hatch="//")
                axes.add_patch(empty)
                continue
            rate = cell["rate"]
            axes.add_patch(Rectangle(place, 1, 1, facecolor=colours(rate), edgecolor=canvas.PAPER))
            ink = "#000000" if rate > BRIGHT else "#ffffff"
            axes.text(column, row, f"{rate:.0%}", color=ink, ha="center", va="center", fontsize=8)
    axes.set_xlim(-0.5, len(cells[0]) - 0.5)
    axes.set_ylim(len(cells) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _name(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)


def _lengths(data: dict) -> list[str]:
    below = data["below_ceiling"]
    return [f"{size:,}{' *' if size in below else ''}" for size in data["lengths"]]


def _percent(share: float) -> str:
    return f"{share:.0%}"
