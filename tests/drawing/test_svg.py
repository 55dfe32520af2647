"""Drawings as SVG: well-formed, escaped, and on their own where no page is around them."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

import kvfx
from kvfx.drawing.boxes import Box, Drawing, Edge
from kvfx.drawing.svg import svg_for_page, svg_of
from kvfx.errors import InputError
from kvfx.testing.tiny import tiny_llama

NAME = "{http://www.w3.org/2000/svg}"
ODD = Drawing(
    (Box("kvfx", "<script>alert('x')</script>", 'a "b" & c'), Box("cache", "Full cache", "score")),
    (Edge(0, 1, "<k>"),),
)


@pytest.fixture(scope="module")
def fast():
    return kvfx.compress(tiny_llama(), kvfx.SnapKV(budget=0.5), compile=False, verify=False)


def words(root):
    return [text.text for text in root.iter(f"{NAME}text")]


@pytest.mark.parametrize("program", ["prefill", "extend", "decode", "compact"])
def test_the_svg_of_a_program(fast, program):
    root = ElementTree.fromstring(fast.graph(program).svg(layer=1))
    assert root.tag == f"{NAME}svg"
    assert root.get("aria-label") == f"{program}, layer 1 (lowered)"
    assert root.find(f"{NAME}style") is not None
    assert "Full cache" in words(root)
    assert root.find(f".//{NAME}g[@tabindex]") is None


def test_a_notebook_shows_the_first_layer(fast):
    assert fast.graph("decode")._repr_svg_() == fast.graph("decode").svg(layer=0)
    assert "attention" in words(ElementTree.fromstring(fast.raised._repr_svg_()))


def test_a_missing_layer_is_refused(fast):
    with pytest.raises(InputError, match="layer=9: the graph has no such layer"):
        fast.graph("decode").svg(layer=9)


def test_words_are_escaped():
    root = ElementTree.fromstring(svg_of(ODD, "a < b & 'c'"))
    assert root.get("aria-label") == "a < b & 'c'"
    assert words(root)[:1] == ["<k>"]
    assert "<script>alert('x')</script>" in words(root)
    assert root.find(f".//{NAME}script") is None


def test_a_page_gets_buttons_and_no_style():
    root = ElementTree.fromstring(svg_for_page(ODD, "odd", {1}))
    buttons = root.findall(f".//{NAME}g[@role='button']")
    assert root.find(f"{NAME}style") is None
    assert [button.get("data-box") for button in buttons] == ["1"]
    assert buttons[0].get("tabindex") == "0"
    assert buttons[0].get("aria-label") == "Full cache, score: details"
