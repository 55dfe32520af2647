"""The cells of the picture are rates by depth and length."""

from __future__ import annotations

import pytest

from kvfx.errors import InputError
from kvfx.figures import needles

pytest.importorskip("matplotlib", reason="pip install matplotlib")


def test_cells_are_rates(retrieval):
    labels = ("Full()", "SnapKV(budget=0.5)")
    data = needles.data([retrieval(label, size) for size in (1024, 512) for label in labels])
    assert data["lengths"] == [512, 1024]
    assert data["depths"] == [0.1, 0.3, 0.5, 0.7, 0.9]
    full, snap = data["policies"]
    assert full["label"] == "Full()"
    assert {cell["rate"] for row in full["cells"] for cell in row} == {1.0}
    # the first six of ten samples: each depth once, and the first one twice
    assert [row[0]["rate"] for row in snap["cells"]] == [1.0, 0.5, 0.5, 0.5, 0.5]
    assert [row[0]["samples"] for row in snap["cells"]] == [2] * 5


def test_what_was_not_measured_is_no_rate(retrieval):
    group = [retrieval("Full()", 512), retrieval("Full()", 1024), retrieval("KIVI(bits=4)", 1024)]
    kivi = needles.data(group)["policies"][1]["cells"]
    assert [row[0] for row in kivi] == [None] * 5
    assert all(row[1]["rate"] == 1.0 for row in kivi)
    figure = needles.draw(needles.data(group))
    assert [patch.get_hatch() for patch in figure.axes[1].patches].count("//") == 5


def test_lengths_below_the_ceiling_are_marked(retrieval):
    group = [retrieval("Full()", 512), retrieval("Full()", 1024, hits=7)]
    data = needles.data(group)
    assert data["below_ceiling"] == [1024]
    axes = needles.draw(data).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["512", "1,024 *"]


def test_one_length_is_a_row_per_policy(measurements):
    group = [found for found in measurements if found.setting.task == "needle-prose"]
    figure = needles.draw(needles.data(group))
    assert len(figure.axes) == 1
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [found.label for found in group]
    assert figure.axes[0].texts[5].get_text() == "100%"


def test_a_task_without_depths_is_refused(fidelity, retrieval):
    with pytest.raises(InputError, match="cwe: its answers have no depth"):
        needles.data([retrieval("Full()", task="cwe")])
    with pytest.raises(InputError, match="perplexity: its answers have no depth"):
        needles.data([fidelity("Full()")])
