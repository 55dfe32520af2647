"""Tables of measurements inside pages: filled from the files that commands wrote, never by hand.

<!-- measured: stores -->
everything between the two comments is written by this program
<!-- end of measured -->
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from examples.benchmarks import tables
from kvfx.errors import InputError

ROOT = Path(__file__).parents[2]
# measured files that pages are written from
DATA = ROOT / "docs/data/measured"
BLOCK = re.compile(r"<!-- measured: ([\w-]+) -->\n(.*?)<!-- end of measured -->", re.DOTALL)

# a block's name -> the file that it shows, and how
TABLES: dict[str, tuple[str, Callable[[Path], str]]] = {
    "stores": ("stores.json", tables.fidelity),
    "methods": ("methods.json", tables.by_budget),
    "equal-bytes": ("equal-bytes.json", tables.by_share),
    "peers": ("peers/quality.json", tables.evaluated),
    "peers-speed": ("peers/speed.json", tables.decoded),
}


def pages() -> list[Path]:
    """The pages that have measured blocks."""
    every = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    return [page for page in every if BLOCK.search(page.read_text("utf-8"))]


def filled(text: str, data: Path = DATA) -> str:
    """A page's text, each block written anew from its file; an unknown name raises InputError."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise InputError(f"<!-- measured: {name} -->: known are {', '.join(TABLES)}")
        file, shown = TABLES[name]
        if not (data / file).exists():
            raise InputError(f"<!-- measured: {name} -->: {data / file} is missing: measure it")
        body = shown(data / file).strip()
        return f"<!-- measured: {name} -->\n{body}\n<!-- end of measured -->"

    return BLOCK.sub(table, text)


def write_pages() -> list[Path]:
    """Write all blocks of all pages from the measured files; the pages that have any."""
    found = pages()
    for page in found:
        page.write_text(filled(page.read_text("utf-8")), "utf-8")
    return found
