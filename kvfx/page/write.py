"""The page as one HTML file: its template with style, program and data inlined."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from kvfx.page.data import Subject, page_data


def page_html(data: dict) -> str:
    """The page of this data; it needs no network and no other file."""
    folder = files("kvfx.page")
    template, style, program = (
        folder.joinpath(name).read_text("utf-8") for name in ("page.html", "page.css", "page.js")
    )
    # a text may say </script>: in JSON, < can be written without itself
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    for name, content in (("style", style), ("program", program), ("data", text)):
        before, _, after = template.partition(f"{{{{ {name} }}}}")
        template = f"{before}{content}{after}"
    return template


def save_page(path: Path | str, subject: Subject) -> Path:
    """Write the page about `subject` to `path`: where it was written."""
    path = Path(path)
    path.write_text(page_html(page_data(subject)), "utf-8")
    return path
