"""A drawing as SVG: for the page, which styles it, and for papers and notebooks, on its own."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from xml.sax.saxutils import escape, quoteattr

from kvfx.drawing.boxes import Drawing
from kvfx.drawing.layout import Layout, Place, lay_out

# what belongs to the attention: it is underlaid
REGION = ("rope", "attention", "kvfx", "cache")
HALO = 11
# how boxes look where no page says so
STYLE = """
svg { background: #ffffff; }
text { font: 600 12px system-ui, "Helvetica Neue", Arial, sans-serif; fill: #22252b; }
text.sub { font: 10.5px ui-monospace, "SF Mono", Menlo, Consolas, monospace; fill: #5f6672; }
text.label { font: 10px ui-monospace, "SF Mono", Menlo, Consolas, monospace; fill: #8a4b1f; }
.shape { fill: #ffffff; stroke: #9aa1ad; }
.edge { fill: none; stroke: #9aa1ad; stroke-width: 1.2; }
.head { fill: #9aa1ad; }
.halo { fill: #fdf1e6; stroke: none; }
.halo-edge { fill: none; stroke: #fdf1e6; stroke-width: 22; stroke-linecap: round; }
.linear .shape { fill: #eef3fb; stroke: #8fa8cf; }
.norm .shape, .act .shape { fill: #f5f6f8; stroke: #b9bec8; }
.rope .shape { fill: #fff9f2; stroke: #d9a878; }
.attention .shape { fill: #f6c999; stroke: #b5652a; }
.kvfx .shape { fill: #fde3c8; stroke: #c98145; }
.cache .shape { fill: #ffffff; stroke: #b5652a; }
.input .shape, .output .shape { fill: none; stroke: none; }
"""


def svg_of(drawing: Drawing, title: str) -> str:
    """A drawing as an SVG document that stands on its own; `title` is what it is read out as."""
    layout = lay_out(drawing)
    return _document(drawing, layout, title, (), f"<style>{STYLE}</style>")


def svg_for_page(drawing: Drawing, title: str, opens: Collection[int]) -> str:
    """The same for a page with styles of its own, where the boxes numbered in `opens` are
    buttons.
    """
    return _document(drawing, lay_out(drawing), title, opens, "")


def _document(
    drawing: Drawing, layout: Layout, title: str, opens: Collection[int], style: str
) -> str:
    width, height = round(layout.width), round(layout.height)
    return "".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="group" aria-label={quoteattr(title)}>',
            style,
            *_halo(drawing, layout),
            *(
                _edge(path, edge.label)
                for edge, path in zip(drawing.edges, layout.paths, strict=True)
            ),
            *(
                _box(drawing, layout, number, number in opens)
                for number in range(len(layout.places))
            ),
            "</svg>",
        )
    )


def _halo(drawing: Drawing, layout: Layout) -> list[str]:
    """What lies under the attention and the cache."""
    inside = {number for number, box in enumerate(drawing.boxes) if box.kind in REGION}
    lines = [
        f'<path class="halo-edge" d="{_curve(path)}"/>'
        for edge, path in zip(drawing.edges, layout.paths, strict=True)
        if edge.source in inside and edge.target in inside
    ]
    return lines + [
        _rectangle(layout.places[number], "halo", HALO, 14) for number in sorted(inside)
    ]


def _edge(path: Sequence[tuple[float, float]], label: str) -> str:
    x, y = path[-1]
    body = (*path[:-1], (x, y - 5))
    text = (
        f'<text class="label" x="{x + 5:.0f}" y="{y - 9:.0f}">{escape(label)}</text>'
        if label
        else ""
    )
    head = f"M{x - 3.5:.1f} {y - 6:.1f}h7L{x:.1f} {y:.1f}z"
    return f'<path class="edge" d="{_curve(body)}"/><path class="head" d="{head}"/>{text}'


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """A smooth line through points, from top to bottom, upright at each of them."""
    parts = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for (a, b), (x, y) in itertools.pairwise(points):
        if abs(a - x) < 0.5:
            parts.append(f"L{x:.1f} {y:.1f}")
            continue
        half = (b + y) / 2
        parts.append(f"C{a:.1f} {half:.1f} {x:.1f} {half:.1f} {x:.1f} {y:.1f}")
    return "".join(parts)


def _rectangle(place: Place, kind: str, grow: float, radius: float) -> str:
    width, height = place.width + 2 * grow, place.height + 2 * grow
    return (
        f'<rect class="{kind}" x="{place.x - width / 2:.1f}" y="{place.y - height / 2:.1f}" '
        f'width="{width:.1f}" height="{height:.1f}" rx="{radius:.0f}"/>'
    )


def _box(drawing: Drawing, layout: Layout, number: int, opens: bool) -> str:
    box, place = drawing.boxes[number], layout.places[number]
    shape = _rectangle(place, "shape", 0, place.height / 2 if box.kind == "join" else 7)
    if box.kind == "cache":
        # a second line on top: what is stored lies in layers
        shape += (
            f'<path class="edge" d="M{place.x - place.width / 2 + 4:.1f} '
            f'{place.y - place.height / 2 + 5:.1f}h{place.width - 8:.1f}"/>'
        )
    title = _text(place.x, place.y - (3.5 if box.subtitle else -4), "", box.title)
    subtitle = _text(place.x, place.y + 12, "sub", box.subtitle) if box.subtitle else ""
    label = f"{box.title}, {box.subtitle}" if box.subtitle else box.title
    spoken = quoteattr(f"{label}: details")
    button = f' tabindex="0" role="button" data-box="{number}" aria-label={spoken}' if opens else ""
    return f'<g class="box {box.kind}"{button}>{shape}{title}{subtitle}</g>'


def _text(x: float, y: float, kind: str, text: str) -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'
