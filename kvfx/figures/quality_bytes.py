"""Quality against the bytes of the cache: a panel per measure, a line per method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvfx.errors import InputError
from kvfx.eval.answers import CEILING, Retrieval
from kvfx.eval.estimates import KL, RATE, RATIO, estimate
from kvfx.eval.fidelity import Fidelity
from kvfx.eval.results import Measurement
from kvfx.eval.table import DENSE, by_setting, dense_of
from kvfx.figures import canvas
from kvfx.figures.labels import method_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# nats: what is nearer to the dense model is rounding, and drawn at the edge
FLOOR = 1e-7
# ratios of a panel that are farther apart are drawn on a log scale
FAR = 3.0
# settings that tell panels of one task apart, in the words of a title
APART = {
    "question": "{}",
    "text": "{}",
    "samples": "{} samples",
    "seed": "seed {}",
    "scored": "{} scored",
    "chunk": "by {}",
}
# inches of a panel, by how many there are beside it
WIDTHS, WIDTH, HEIGHT, COLUMNS = {1: 5.4, 2: 3.9}, 2.75, 2.45, 3


def data(measurements: Sequence[Measurement], order: Sequence[str] = ()) -> dict:
    """What is drawn of measurements of one model at one length: panels of points, each with its
    share of the dense bytes, its value and the ends of its 95 % interval. `methods` gives each
    method the number of its pen, by its place in `order` where pictures are to agree.

    A task without the dense cache among its policies is named in `left_out`: nothing says what its
    bytes are a share of. Raises InputError where no task is left.
    """
    panels, left_out = [], []
    for group in by_setting(measurements):
        dense = dense_of(group)
        if dense is None:
            left_out.append(group[0].setting.task)
            continue
        panels += [_panel(measure, group, dense) for measure in _measures(dense)]
    if not panels:
        raise InputError(
            f"{', '.join(left_out)}: the dense cache was not measured, so there is no share of its "
            "bytes to draw: measure Full() as well"
        )
    _tell_apart(panels)
    drawn = {point["method"] for panel in panels for point in panel["points"]}
    every = dict.fromkeys((*order, *methods(measurements)))
    return {
        "figure": "quality_bytes",
        "model": measurements[0].setting.model,
        "length": measurements[0].setting.length,
        "methods": {name: number for number, name in enumerate(every) if name in drawn},
        "panels": panels,
        "left_out": left_out,
    }


def methods(measurements: Sequence[Measurement]) -> list[str]:
    """The methods that are drawn, in the order in which they were measured."""
    others = (found for found in measurements if found.setting.policy != DENSE)
    return list(dict.fromkeys(method_of(found.label) for found in others))


def draw(data: dict) -> Figure:
    """The picture of that data."""
    canvas.need_matplotlib("quality_bytes")
    from matplotlib.lines import Line2D

    pens = {name: canvas.pen(number) for name, number in data["methods"].items()}
    entries = [
        (name, Line2D([], [], color=pen.colour, marker=pen.marker, linestyle=pen.dash))
        for name, pen in pens.items()
    ]
    entries.append(("dense", Line2D([], [], color=canvas.INK, linestyle=canvas.DENSE)))
    count = len(data["panels"])
    size = (WIDTHS.get(count, WIDTH), HEIGHT)
    more = canvas.legend_inches(size[0] * min(count, COLUMNS), [name for name, _ in entries])
    with canvas.look():
        figure, grid = canvas.panels(count, COLUMNS, size, more)
        for axes, panel in zip(grid, data["panels"], strict=True):
            _draw_panel(axes, panel, pens)
        canvas.legend(figure, entries)
    return figure


def _measures(dense: Measurement) -> tuple[str, ...]:
    return (KL, RATIO) if isinstance(dense.scores, Fidelity) else (RATE,)


def _panel(measure: str, group: Sequence[Measurement], dense: Measurement) -> dict:
    points = [_point(measure, found, dense) for found in group if found is not dense]
    value = estimate(measure, dense)[0]
    every = [value, *(point["value"] for point in points)]
    edge = _edge(every) if measure == KL else None
    setting, below = dense.setting, False
    if isinstance(dense.scores, Retrieval):
        below = dense.scores.below_ceiling
    return {
        "task": setting.task,
        "measure": measure,
        "title": {KL: "KL to dense, nats", RATIO: "perplexity, ratio to dense"}.get(
            measure, setting.task
        ),
        "note": _note(measure, below, setting.samples, edge is not None and min(every) < edge),
        "below_ceiling": below,
        "edge": edge,
        "seed": setting.seed,
        "samples": setting.samples,
        "text": setting.text,
        **{str(name): value for name, value in setting.options.items()},
        "dense": value,
        "dense_bytes": dense.scores.cache_bytes,
        "points": sorted(points, key=lambda point: point["bytes"]),
    }


def _edge(values: Sequence[float]) -> float:
    """The power of ten below the smallest divergence that is more than rounding."""
    least = min((value for value in values if value > FLOOR), default=1.0)
    return 10.0 ** math.floor(math.log10(least))


def _note(measure: str, below: bool, samples: int, edged: bool) -> str:
    if below:
        return f"below ceiling: dense under {CEILING:.0%}, no ranking"
    if measure == KL:
        return f"log scale{'; less, as dense, is at the edge' if edged else ''}"
    return f"{samples} {'samples' if measure == RATE else 'windows'}, 95 % intervals"


def _tell_apart(panels: Sequence[dict]) -> None:
    """Panels of one task are called after that in which they differ."""
    for panel in panels:
        same = [other for other in panels if other["title"] == panel["title"]]
        panel["differs"] = "".join(
            f", {words.format(panel[name])}"
            for name, words in APART.items()
            if len({other.get(name) for other in same}) > 1
        )
    for panel in panels:
        panel["title"] += panel.pop("differs")


def _point(measure: str, found: Measurement, dense: Measurement) -> dict:
    value, edges = estimate(measure, found)
    size = found.scores.cache_bytes
    return {
        "method": method_of(found.label),
        "label": found.label,
        "bytes": size,
        "share": size / dense.scores.cache_bytes,
        "value": value,
        "low": None if edges is None else edges[0],
        "high": None if edges is None else edges[1],
    }


def _draw_panel(axes: Axes, panel: dict, pens: dict[str, canvas.Pen]) -> None:
    least = -math.inf if panel["edge"] is None else panel["edge"]
    for name, pen in pens.items():
        points = [point for point in panel["points"] if point["method"] == name]
        if not points:
            # matplotlib gives a line without points a place, at the edge of the whole figure
            continue
        colour = canvas.GREY if panel["below_ceiling"] else pen.colour
        x = [100 * point["share"] for point in points]
        y = [max(point["value"], least) for point in points]
        axes.plot(x, y, color=colour, marker=pen.marker, linestyle=pen.dash, clip_on=False)
        for at, point in zip(x, points, strict=True):
            if point["low"] is not None:
                ends = [max(point[end], least) for end in ("low", "high")]
                axes.plot([at, at], ends, color=colour, linewidth=0.9, alpha=0.6)
    colour = canvas.GREY if panel["below_ceiling"] else canvas.INK
    dense = max(panel["dense"], least)
    axes.axhline(dense, color=colour, linestyle=canvas.DENSE, lw=1, zorder=1.5, clip_on=False)
    canvas.titled(axes, panel["title"], panel["note"])
    axes.set_xlabel("cache, % of dense")
    axes.set_xlim(0, 108 * max((point["share"] for point in panel["points"]), default=1))
    _scale(axes, panel)
    if panel["below_ceiling"]:
        axes.tick_params(colors=canvas.GREY)


def _scale(axes: Axes, panel: dict) -> None:
    """The vertical axis of a measure."""
    from matplotlib.ticker import LogLocator

    values = [point["value"] for point in panel["points"]] or [1.0]
    if panel["measure"] == KL:
        axes.set_yscale("log")
        axes.set_ylim(bottom=panel["edge"])
    elif panel["measure"] == RATE:
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    elif max(values) > FAR:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
