"""A trace as a picture: a panel per site, positions to the right, steps downwards."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

from kvfx.cache_trace.trace import STATUSES, CacheTrace
from kvfx.figures.canvas import need_matplotlib

COLOURS = {
    "exact": "#2f5d9b",
    "quantized": "#e0954f",
    "merged": "#8d6bb0",
    "dropped": "#ece9e3",
    "passed": "#d5dbe4",
}
STYLE = "".join(
    [
        "svg { background: #ffffff; }",
        "text { font: 11px system-ui, Arial, sans-serif; fill: #22252b; }",
    ]
    + [f".{status} {{ fill: {colour}; }}" for status, colour in COLOURS.items()]
    + [".frame { fill: none; stroke: #9aa1ad; }"]
)
# pixels
WIDTH, HEIGHT, GAP, TITLE, MARGIN, LEGEND = 200, 110, 18, 18, 12, 46
COLUMNS = 5


def svg_of(trace: CacheTrace, head: int, style: str = STYLE) -> str:
    """The picture of one KV head as SVG; sites with fewer heads show their last one."""
    columns = min(COLUMNS, len(trace.sites))
    rows = -(-len(trace.sites) // columns)
    width = max(2 * MARGIN + columns * (WIDTH + GAP) - GAP, 460)
    height = 2 * MARGIN + rows * (HEIGHT + GAP + TITLE) + LEGEND
    panels = [
        _panel(trace, site, head, MARGIN + (site % columns) * (WIDTH + GAP),
               MARGIN + TITLE + (site // columns) * (HEIGHT + GAP + TITLE))
        for site in range(len(trace.sites))
    ]  # fmt: skip
    label = f"the cache of KV head {head} over {len(trace.steps)} steps: {trace.policy}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(label, {chr(34): "&quot;"})}">'
        f"{f'<style>{style}</style>' if style else ''}{''.join(panels)}"
        f"{_legend(trace, height - LEGEND + 8)}</svg>"
    )


def plot(trace: CacheTrace, head: int, path: Path) -> None:
    """Write the same with matplotlib, in whatever format it knows by that name."""
    need_matplotlib(str(path), ", or save as .svg")
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(COLUMNS, len(trace.sites))
    rows = -(-len(trace.sites) // columns)
    figure = Figure(figsize=(2.4 * columns + 0.4, 1.6 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    number = {status: index + 1 for index, status in enumerate(COLOURS)}
    for site, place in itertools.zip_longest(range(len(trace.sites)), axes.flat):
        if site is None:
            place.axis("off")
            continue
        cells = [
            [number[status] for status in trace.status(site, _head(trace, site, head), step)]
            for step in range(len(trace.steps))
        ]
        cells = [row + [0] * (len(trace.tokens) - len(row)) for row in cells]
        place.imshow(
            cells,
            aspect="auto",
            interpolation="nearest",
            cmap=ListedColormap(["#ffffff", *COLOURS.values()]),
            vmin=0,
            vmax=len(COLOURS),
        )
        place.set_title(trace.sites[site].name, fontsize=7)
        place.tick_params(labelsize=6)
    used = _used(trace)
    patches = [Patch(facecolor=COLOURS[status], label=status) for status in used]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(used), fontsize=7)
    figure.supxlabel("position", fontsize=7)
    figure.supylabel("step", fontsize=7)
    figure.savefig(path, dpi=160)


def areas(trace: CacheTrace, site: int, head: int) -> Iterator[tuple[str, int, int, int, int]]:
    """What one KV head is made of: a status, from which step to which, the first position that has
    it and how many; neighbours with the same history are one.
    """
    changes: list[list[tuple[int, str]]] = [[] for _ in trace.tokens]
    for change in trace.sites[site].heads[head]:
        changes[change.position].append((change.step, change.status))
    for timeline, group in itertools.groupby(range(len(changes)), changes.__getitem__):
        positions = list(group)
        ends = [start for start, _ in timeline[1:]] + [len(trace.steps)]
        for (start, status), end in zip(timeline, ends, strict=True):
            yield status, start, end, positions[0], len(positions)


def _head(trace: CacheTrace, site: int, head: int) -> int:
    return min(head, len(trace.sites[site].heads) - 1)


def _used(trace: CacheTrace) -> list[str]:
    """The statuses that occur, in the order of the legend."""
    found = {change.status for site in trace.sites for changes in site.heads for change in changes}
    return [status for status in STATUSES if status in found]


def _panel(trace: CacheTrace, site: int, head: int, left: int, top: int) -> str:
    """One site: a path per status, made of rectangles in units of tokens and steps."""
    paths: dict[str, list[str]] = {}
    for status, start, end, first, count in areas(trace, site, _head(trace, site, head)):
        path = f"M{first} {start}h{count}v{end - start}h-{count}z"
        paths.setdefault(status, []).append(path)
    scale = f"scale({WIDTH / len(trace.tokens):.5f} {HEIGHT / len(trace.steps):.5f})"
    cells = "".join(
        f'<path class="{status}" d="{"".join(parts)}"/>' for status, parts in paths.items()
    )
    return (
        f'<text x="{left}" y="{top - 5}">{escape(trace.sites[site].name)}</text>'
        f'<g transform="translate({left} {top}) {scale}" shape-rendering="crispEdges">{cells}</g>'
        f'<rect class="frame" x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}"/>'
    )


def _legend(trace: CacheTrace, top: int) -> str:
    left, parts = MARGIN, []
    for status in _used(trace):
        parts.append(
            f'<rect class="{status}" x="{left}" y="{top}" width="11" height="11"/>'
            f'<text x="{left + 16}" y="{top + 10}">{status}</text>'
        )
        left += 90
    text = f"{len(trace.tokens)} positions to the right, {len(trace.steps)} steps downwards"
    return "".join(parts) + f'<text x="{MARGIN}" y="{top + 28}">{text}</text>'
