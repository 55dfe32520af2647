"""Results as one HTML page with its pictures inside: `kvfx report`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from kvfx import __version__
from kvfx.figures import markup, page_parts
from kvfx.figures.collect import Picture
from kvfx.figures.inputs import Inputs
from kvfx.figures.save import svg_for_page, svg_text

TITLES = {
    "overview": "Where it was measured",
    "quality": "Quality",
    "speed": "Speed",
    "layers": "Layers",
    "settings": "Settings",
}


def save_report(path: Path, inputs: Inputs, pictures: Sequence[Picture]) -> None:
    """Write the page of the inputs and their pictures to `path`."""
    path.write_text(page_html(inputs, pictures), "utf-8")


def page_html(inputs: Inputs, pictures: Sequence[Picture]) -> str:
    """The page; it needs no network and no other file. Equal inputs give equal pages."""
    drawn = {name: [_figure(one) for one in pictures if one.section == name] for name in TITLES}
    written = {
        "overview": page_parts.overview(inputs),
        "quality": page_parts.tables(inputs),
        "speed": [*page_parts.even(pictures), *page_parts.benches(inputs)],
        "layers": page_parts.plans(inputs),
        "settings": page_parts.settings(inputs),
    }
    filled = {name: [*drawn[name], *parts] for name, parts in written.items()}
    filled = {name: parts for name, parts in filled.items() if parts}
    title = markup.text(_title(inputs))
    contents = {
        "title": title,
        "style": _style(),
        "links": "".join(f'<a href="#{name}">{TITLES[name]}</a>' for name in filled),
        "sections": "\n".join(
            markup.section(name, TITLES[name], *parts) for name, parts in filled.items()
        ),
        "footer": f"Written by kvfx report, kvfx {__version__}.",
    }
    page = files("kvfx.figures").joinpath("page.html").read_text("utf-8")
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: contents[match[1]], page)


def _title(inputs: Inputs) -> str:
    models = [found.setting.model for found in inputs.measurements]
    models += [bench.model for bench in inputs.benches]
    return ", ".join(dict.fromkeys(models)) or ", ".join(inputs.plans)


def _style() -> str:
    """That of the page of a compressed model, and what is added to it."""
    rooms = ("kvfx.page", "kvfx.figures")
    return "".join(files(room).joinpath("page.css").read_text("utf-8") for room in rooms)


def _figure(picture: Picture) -> str:
    svg = svg_for_page(svg_text(picture.figure), picture.name, markup.text(picture.caption))
    return markup.figure(svg, picture.caption)
