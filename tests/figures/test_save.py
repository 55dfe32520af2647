"""Figures as files: complete, alone, and equal where what is drawn is equal."""

from __future__ import annotations

import json
import re
import sys
from xml.etree import ElementTree

import pytest

from kvfx.errors import UnsupportedOperation
from kvfx.figures import canvas, needles, quality_bytes, speed
from kvfx.figures.save import save, svg_for_page, svg_text


@pytest.fixture
def made(measurements, rows):
    """Every kind of figure that has no plan: the function that draws, and its data."""
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    needle = [found for found in measurements if found.setting.task == "needle-prose"]
    return {
        "quality_bytes": (quality_bytes.draw, quality_bytes.data(measurements)),
        "needles": (needles.draw, needles.data(needle)),
        "speed": (speed.draw, speed.data("tiny", "a CPU", rows)),
    }


def test_equal_data_give_equal_bytes(made, tmp_path):
    for name, (draw, data) in made.items():
        first = save(draw(data), data, tmp_path / f"{name}_a.b")
        second = save(draw(json.loads(json.dumps(data))), data, tmp_path / name)
        assert [path.name for path in first] == [
            f"{name}_a.b{s}" for s in (".svg", ".png", ".json")
        ]
        for a, b in zip(first, second, strict=True):
            assert a.read_bytes() == b.read_bytes()
        assert first[1].read_bytes().startswith(b"\x89PNG")
        assert json.loads(first[2].read_text()) == json.loads(json.dumps(data))


def test_saving_again_changes_nothing(made):
    draw, data = made["quality_bytes"]
    figure = draw(data)
    assert svg_text(figure) == svg_text(figure)


def test_the_look_is_not_the_users(made):
    import matplotlib

    draw, data = made["speed"]
    plain = svg_text(draw(data))
    with matplotlib.rc_context({"font.size": 30, "axes.linewidth": 3, "svg.fonttype": "none"}):
        assert svg_text(draw(data)) == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_an_svg_needs_nothing_else(made):
    for draw, data in made.values():
        text = svg_text(draw(data))
        ElementTree.fromstring(text)
        assert not re.search(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
        assert "<image" not in text
        assert "date" not in text.lower()


def test_a_part_of_a_page_has_its_own_ids_and_the_colours_of_the_page(made):
    draw, data = made["quality_bytes"]
    text = svg_text(draw(data))
    part = svg_for_page(text, "one", "a &lt; b")
    ids = re.findall(r'\bid="([^"]*)"', part)
    assert len(ids) == len(set(ids)) > 10
    assert all(name.startswith("one-") for name in ids)
    used = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', part)
    assert used
    assert {a or b for a, b in used} <= set(ids)
    assert canvas.INK in text
    assert canvas.INK not in part
    assert "var(--ink)" in part
    assert part.startswith('<svg role="img" aria-label="a &lt; b" ')


def test_without_matplotlib_it_says_what_to_do(measurements, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    data = quality_bytes.data(measurements)
    with pytest.raises(UnsupportedOperation, match=r"pip install 'kvfx\[plot\]'"):
        quality_bytes.draw(data)
