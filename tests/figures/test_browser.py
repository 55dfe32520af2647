"""The report in a browser, at two widths, in two themes, and on paper.

Needs the Python package `playwright` and an installed Chromium; nothing is downloaded.
"""

from __future__ import annotations

import pytest

from kvfx.figures.collect import pictures
from kvfx.figures.inputs import read_inputs
from kvfx.figures.page import save_report

pytest.importorskip("matplotlib", reason="pip install matplotlib")


def test_the_report_opens_and_never_scrolls_sideways(browser, results_file, bench_file, tmp_path):
    inputs = read_inputs([results_file, bench_file])
    save_report(tmp_path / "report.html", inputs, pictures(inputs))
    errors, papers = [], set()
    for width in (700, 1280):
        for scheme in ("light", "dark"):
            tab = browser.new_page(
                viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
            )
            tab.on("pageerror", lambda error: errors.append(str(error)))
            tab.on("console", lambda message: errors.append(message.text))
            tab.on("requestfailed", lambda request: errors.append(request.url))
            tab.goto(f"file://{tmp_path / 'report.html'}")
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            for index in range(tab.locator("summary").count()):
                tab.locator("summary").nth(index).click()
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            assert tab.inner_text("h1") == "tiny"
            assert tab.locator("figure svg").count() == 3
            ink = "getComputedStyle(document.querySelector('figure svg [id$=patch_1] path')).fill"
            papers.add((scheme, tab.evaluate(ink)))
            tab.emulate_media(media="print", color_scheme=scheme)
            assert not tab.is_visible(".top nav")
            tab.close()
    assert errors == []
    # the paper of a picture is that of the page's theme
    assert len(papers) == 2
    assert len({colour for _, colour in papers}) == 2
