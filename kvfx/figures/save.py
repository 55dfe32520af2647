"""A figure as files: SVG, PNG, and the numbers that are drawn."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from kvfx.figures.canvas import GREY, INK, LINE, PAPER, QUIET, look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# pixels per inch
DENSITY = 160
# what a page calls the colours of a picture
VARIABLES = {
    INK: "var(--ink)",
    QUIET: "var(--quiet)",
    LINE: "var(--line)",
    GREY: "var(--stroke)",
    PAPER: "var(--card)",
}


def save(figure: Figure, data: dict, path: Path | str) -> list[Path]:
    """Write `path` with .svg, .png and .json (what is drawn) behind it: the paths."""
    made = [Path(f"{path}{suffix}") for suffix in (".svg", ".png", ".json")]
    made[0].write_text(svg_text(figure), "utf-8")
    with look():
        figure.savefig(made[1], dpi=DENSITY, metadata={"Software": None})
    made[2].write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return made


def svg_text(figure: Figure) -> str:
    """The figure as SVG that names no other file and no date: equal figures give equal text."""
    _settle(figure)
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with look(), io.StringIO() as text:
        figure.savefig(text, format="svg", metadata=unsaid)
        found = text.getvalue()
    return found[found.index("<svg ") :]


def _settle(figure: Figure) -> None:
    """Find the places of everything once: a second search starts where the first ended."""
    if figure.get_layout_engine() is not None:
        with look():
            figure.draw_without_rendering()
        figure.set_layout_engine("none")


def svg_for_page(text: str, name: str, title: str) -> str:
    """The SVG `text` as a part of a page: ids of its own, the page's colours, and a `title` (HTML)
    for those who do not see it.
    """
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1).strip()
