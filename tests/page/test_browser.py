"""The page in a browser: every interaction, by mouse and by keyboard, at two widths and in two
themes.

Needs the Python package `playwright` and an installed Chromium; nothing is downloaded.
"""

from __future__ import annotations

import time

import pytest
import torch

import kvfx
from kvfx.errors import UnsupportedShape
from kvfx.testing.tiny import tiny_llama

SIZES = {"wide": (1400, 900), "narrow": (400, 860)}


@pytest.fixture
def view(browser, page):
    """The page, opened as `view(size, scheme)`; errors in it fail the test."""
    opened, errors = [], []

    def show(size: str = "wide", scheme: str = "light", path=page):
        width, height = SIZES[size]
        tab = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
        )
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        tab.goto(f"file://{path}")
        opened.append(tab)
        return tab

    yield show
    for tab in opened:
        tab.close()
    assert errors == []


def focused(tab) -> str:
    return tab.evaluate("document.activeElement.outerHTML.slice(0, 200)")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_never_scrolls_sideways(view, size, scheme):
    tab = view(size, scheme)
    width = SIZES[size][0]
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    for index in range(tab.evaluate("data.steps.length")):
        tab.evaluate(f"go({index})")
        assert tab.evaluate("document.documentElement.scrollWidth") == width
    for program in ("prefill", "extend", "decode", "compact"):
        tab.check(f"#programs input[value={program}]")
        assert tab.evaluate("document.documentElement.scrollWidth") == width


def test_the_overview(view):
    tab = view()
    assert tab.title() == "LlamaForCausalLM · SnapKV(budget=0.5) | KIVI(bits=4) · kvfx"
    assert tab.inner_text("h1") == "LlamaForCausalLM"
    assert tab.locator(".bars").first.locator("li").count() == 2
    assert "model.layers.0-1.self_attn" in tab.inner_text("#facts")
    assert tab.inner_text("#sections").split() == ["Overview", "Layers", "Passes"]
    assert "undefined" not in tab.inner_text("body")
    assert "null" not in tab.inner_text("body").split()


def test_another_program_is_another_graph(view):
    tab = view()
    seen = {}
    for program in ("prefill", "extend", "decode", "compact"):
        tab.check(f"#programs input[value={program}]")
        seen[program] = tab.inner_html("#after")
        assert tab.inner_text("#does").startswith(program)
    assert len(set(seen.values())) == 4
    assert "attend_prompt" in seen["prefill"]
    assert "attend_scored_kivi" in seen["decode"]
    before = tab.inner_html("#before")
    tab.check("#kinds input[value='1']")
    assert "lm_head" in tab.inner_html("#before") != before


def test_radio_buttons_are_walked_by_arrows(view):
    tab = view()
    tab.focus("#programs input[value=decode]")
    tab.keyboard.press("ArrowRight")
    assert tab.is_checked("#programs input[value=compact]")
    assert tab.inner_text("#does").startswith("compact")


def test_a_click_on_a_node_opens_its_details(view):
    tab = view()
    tab.click("#after .attention[data-box]")
    assert tab.inner_text("#detail-title") == "kvfx.attend_scored_kivi"
    text = tab.inner_text("#detail-body")
    for part in ("model.layers.0.self_attn and 1 like it", "SnapKV | KIVI", "k_codes",
                 "i16[B,2,C,8,32]", "def attend_scored(", "kvfx::attend_scored_kivi("):  # fmt: skip
        assert part in text
    tab.click("#close")
    assert not tab.evaluate("document.getElementById('detail').open")


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_a_key_on_a_node_opens_its_details_and_escape_returns(view, key):
    tab = view()
    tab.focus("#after .cache[data-box]")
    assert 'aria-label="KIVI cache' in focused(tab)
    tab.keyboard.press(key)
    assert tab.inner_text("#detail-title") == "KIVI cache"
    assert "k_codes" in tab.inner_text("#detail-body")
    tab.keyboard.press("Escape")
    assert not tab.evaluate("document.getElementById('detail').open")
    assert 'aria-label="KIVI cache' in focused(tab)


def test_every_box_that_can_be_chosen_opens(view):
    tab = view()
    for program in ("prefill", "extend", "decode", "compact"):
        tab.check(f"#programs input[value={program}]")
        boxes = tab.locator("#after [data-box]")
        assert boxes.count() > 2
        for index in range(boxes.count()):
            boxes.nth(index).focus()
            tab.keyboard.press("Enter")
            assert tab.inner_text("#detail-title")
            assert "undefined" not in tab.inner_text("#detail-body")
            tab.keyboard.press("Escape")


def test_passes_are_walked_by_buttons(view):
    tab = view()
    first = tab.inner_text("#step h3")
    assert first == "canonicalize"
    assert tab.is_disabled("[data-walk=previous]")
    tab.click("[data-walk=next]")
    assert tab.inner_text("#step h3") != first
    assert tab.inner_text("#steps [aria-current]") == tab.inner_text("#step h3")
    assert 'data-walk="next"' in focused(tab)
    tab.click("[data-walk=previous]")
    assert tab.inner_text("#step h3") == first


def test_passes_are_walked_by_arrow_keys_when_they_are_seen(view):
    tab = view()
    tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#step .step-bar span").startswith("1 of")
    tab.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
    tab.evaluate("document.getElementById('passes').scrollIntoView()")
    count = tab.evaluate("data.steps.length")
    for _ in range(count + 2):
        tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#step .step-bar span:text-matches('of')") == f"{count} of {count}"
    tab.keyboard.press("ArrowLeft")
    assert f"{count - 1} of {count}" in tab.inner_text("#step .step-bar")


def test_a_step_is_chosen_from_the_list(view):
    tab = view()
    tab.locator("#steps button", has_text="insert-cache").first.click()
    assert tab.inner_text("#step h3") == "insert-cache · prefill"
    assert "kvfx.attend_prompt(" in tab.inner_text("#step")
    hidden = tab.locator(".diff button").first
    text = hidden.inner_text()
    before = tab.locator(".diff p").count()
    hidden.click()
    assert tab.locator(".diff p").count() == before + int(text.split()[1])


def test_the_theme_follows_the_system_until_it_is_switched(view):
    paper = "getComputedStyle(document.body).backgroundColor"
    light, dark = view("wide", "light"), view("wide", "dark")
    assert light.evaluate(paper) != dark.evaluate(paper)
    light.click("#theme")
    assert light.evaluate(paper) == dark.evaluate(paper)
    light.reload()
    assert light.evaluate(paper) == dark.evaluate(paper)
    light.click("#theme")
    assert light.evaluate(paper) != dark.evaluate(paper)


def test_tab_reaches_everything_in_order(view):
    tab = view()
    tab.keyboard.press("Tab")
    assert "Skip to the content" in focused(tab)
    stops = []
    for _ in range(60):
        tab.keyboard.press("Tab")
        stops.append(focused(tab))
    for part in ("#overview", 'id="theme"', 'value="decode"', "data-box", "data-walk"):
        assert any(part in stop for stop in stops), part
    ring = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert ring != "none"


def test_a_refused_model_says_why(view, tmp_path):
    path = tmp_path / "refused.html"
    with pytest.raises(UnsupportedShape):
        kvfx.explain(tiny_llama(), kvfx.KIVI(bits=4), html=path)
    tab = view("narrow", path=path)
    assert "Refused: UnsupportedShape" in tab.inner_text("#refusal")
    assert "not a multiple of group_size" in tab.inner_text("#refusal")
    assert not tab.is_visible("#layers")
    assert tab.inner_text("#step h3") == "canonicalize"
    assert tab.evaluate("document.documentElement.scrollWidth") == 400


def test_the_page_opens_at_once(view, page):
    start = time.perf_counter()
    view()
    assert time.perf_counter() - start < 2
    assert page.stat().st_size < 500_000


def test_a_trace_is_a_section_with_a_picture_per_head(view, fast, tmp_path):
    trace = fast.trace_cache(torch.arange(3, 63)[None], 10)
    path = fast.save_html(tmp_path / "trace.html", trace=trace)
    for size, (width, _) in SIZES.items():
        tab = view(size, path=path)
        assert tab.inner_text("#sections").split()[-1] == "Cache"
        first = tab.inner_html("#trace .canvas")
        tab.check("#heads input[value='1']")
        assert tab.inner_html("#trace .canvas") != first
        assert "A prompt of 60 tokens and 10 decoded ones" in tab.inner_text("#trace")
        assert tab.evaluate("document.documentElement.scrollWidth") == width
