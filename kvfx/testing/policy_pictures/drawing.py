"""Words, boxes and legends as SVG, on a card that can be read on light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape, quoteattr

COLOURS = {
    "exact": "#2f5d9b",
    "quantized": "#e0954f",
    "merged": "#8d6bb0",
    "dropped": "#dedad2",
    "passed": "#c3cad6",
    "reused": "#7fb8a4",
    "repaired": "#e0954f",
    "late": "#b5497b",
    "computed": "#2f5d9b",
    "kept": "#2f5d9b",
    "values": "#e0954f",
    "even": "#eceae5",
    "odd": "#dcd8d0",
}
STYLE = "".join(
    [
        "text{font:12px system-ui,Arial,sans-serif;fill:#22252b}",
        ".head{font-weight:600}",
        ".code{font:12px ui-monospace,Menlo,Consolas,monospace}",
        ".small{font-size:11px;fill:#5f6672}",
        ".inside{font-size:11px;fill:#fff}",
        ".line{stroke:#5f6672;stroke-width:1;fill:none}",
        ".dash{stroke:#b5497b;stroke-width:1.2;stroke-dasharray:4 3;fill:none}",
        ".mark{fill:#5f6672}",
        *(f".{name}{{fill:{colour}}}" for name, colour in COLOURS.items()),
    ]
)
# pixels
MARGIN, LINE = 16, 18


def document(parts: Sequence[str], width: int, height: int, title: str) -> str:
    """The SVG document; `title` is what it is read out as."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label={quoteattr(title)}><style>{STYLE}</style>'
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8" fill="#fbfaf8" '
        f'stroke="#d5d8dd"/>{"".join(parts)}</svg>\n'
    )


def words(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    """A line of text with its baseline at y."""
    name = f' class="{kind}"' if kind else ""
    at = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text{name} x="{number(x)}" y="{number(y)}"{at}>{escape(text)}</text>'


def box(kind: str, x: float, y: float, width: float, height: float) -> str:
    """A filled rectangle."""
    return (
        f'<rect class="{kind}" x="{number(x)}" y="{number(y)}" width="{number(width)}" '
        f'height="{number(height)}"/>'
    )


def line(kind: str, x: float, y: float, to: str) -> str:
    """A path from a point: `to` is what follows it, such as `v20`."""
    return f'<path class="{kind}" d="M{number(x)} {number(y)}{to}"/>'


def number(value: float) -> str:
    """A coordinate, to a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def legend(entries: Mapping[str, str], top: float) -> str:
    """A swatch and a word for each kind, from left to right."""
    left, parts = float(MARGIN), []
    for kind, text in entries.items():
        parts += [box(kind, left, top, 11, 11), words(left + 16, top + 10, text)]
        left += 16 + width_of(text) + 18
    return "".join(parts)


def width_of(text: str) -> float:
    """About how wide a text is."""
    return 6.3 * len(text)
