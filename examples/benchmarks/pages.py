"""Measured tables and pictures of pages: made from the files that commands wrote, never by hand.

<!-- measured: stores -->
everything between the two comments is written by this program
<!-- end of measured -->
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from examples.benchmarks import tables
from kvfx.bench.reuse_workloads import RAG, TURNS
from kvfx.errors import InputError
from kvfx.figures.collect import pictures
from kvfx.figures.inputs import read_inputs
from kvfx.figures.save import svg_text

ROOT = Path(__file__).parents[2]
# measured files that pages are written from
DATA = ROOT / "docs/data/measured"
BLOCK = re.compile(r"<!-- measured: ([\w-]+) -->\n(.*?)<!-- end of measured -->", re.DOTALL)

# a block's name -> the file that it shows, and how
TABLES: dict[str, tuple[str, Callable[[Path], str]]] = {
    "stores": ("stores.json", tables.fidelity),
    "methods": ("methods.json", tables.by_budget),
    "equal-bytes": ("equal-bytes.json", tables.by_share),
    "equal-bytes-windows": ("gemma.json", tables.by_share),
    "visible": ("visible.json", tables.evaluated),
    "peers": ("peers/quality.json", tables.evaluated),
    "peers-speed": ("peers/speed.json", tables.decoded_by_peers),
    "decode": ("peers/speed.json", tables.decoded),
    "speed-in-words": ("peers/speed.json", tables.in_words),
    "choosing": ("peers/speed.json", tables.chosen),
    "reuse-agents": ("reuse.json", tables.communicated),
    "reuse-rag": ("reuse.json", partial(tables.reused, RAG)),
    "reuse-turns": ("reuse.json", partial(tables.reused, TURNS)),
}
# a picture's name -> the file that it shows, and its name among the pictures of that file
PICTURES: dict[str, tuple[str, str]] = {
    "perplexity-bytes": ("peers/quality.json", "quality_bytes_1"),
    "needles-bytes": ("peers/quality.json", "quality_bytes_2"),
    "needles": ("needles.json", "needles"),
    "context": ("peers/speed.json", "speed"),
}
FIGURES = ROOT / "docs/data/figures"


def sources() -> set[str]:
    """The measured files that pages show."""
    return {file for file, _ in (*TABLES.values(), *PICTURES.values())}


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


def write_pictures() -> None:
    """Draw all pictures of pages from the measured files."""
    shutil.rmtree(FIGURES, ignore_errors=True)
    FIGURES.mkdir(parents=True)
    for name, (file, drawn) in PICTURES.items():
        found = {picture.name: picture for picture in pictures(read_inputs([DATA / file]))}
        (FIGURES / f"{name}.svg").write_text(svg_text(found[drawn].figure), "utf-8")
