"""What is drawn are the numbers of the tables."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from kvfx.errors import InputError
from kvfx.eval.stats import wilson
from kvfx.eval.table import sections
from kvfx.figures import canvas, quality_bytes
from kvfx.figures.labels import method_of

pytest.importorskip("matplotlib", reason="pip install matplotlib")


def test_points_are_shares_of_the_dense_bytes(measurements):
    data = quality_bytes.data(measurements)
    assert [panel["measure"] for panel in data["panels"]] == ["kl", "ratio", "rate"]
    for panel in data["panels"]:
        assert panel["dense_bytes"] == 1000
        assert [point["share"] for point in panel["points"]] == [0.25, 0.3, 0.55]
    kl, ratio, rate = data["panels"]
    assert [point["value"] for point in kl["points"]] == pytest.approx([1e-3, 0.25, 0.04])
    assert [point["value"] for point in ratio["points"]] == pytest.approx(
        [math.exp(1e-3), math.exp(0.25), math.exp(0.04)]
    )
    assert [point["value"] for point in rate["points"]] == [1.0, 0.2, 0.6]
    assert (ratio["dense"], rate["dense"]) == (pytest.approx(1.0), 1.0)


def test_intervals_are_those_of_the_tables(measurements):
    panels = quality_bytes.data(measurements)["panels"]
    perplexity, needle = sections(measurements)
    for panel, column, spec in zip(
        panels, (5, 4, 4), (".2g", ".4f", ".0%"), strict=True
    ):  # perplexity has KL behind the ratio
        rows = {row[0]: row for row in (needle if panel["measure"] == "rate" else perplexity).rows}
        for point in panel["points"]:
            low, high = (format(point[end], spec) for end in ("low", "high"))
            shown = f"{format(point['value'], spec)} [{low}, {high}]"
            assert rows[point["label"]][column] == shown
    assert panels[2]["points"][1]["low"] == wilson(2, 10)[0]


def test_shares_of_answers_have_bootstrap_intervals(retrieval):
    parts = {"question": "hidden", "score": "parts_said"}
    group = [retrieval(label) for label in ("Full()", "SnapKV(budget=0.5)")]
    group = [replace(one, setting=replace(one.setting, options=parts)) for one in group]
    point = quality_bytes.data(group)["panels"][0]["points"][0]
    assert point["value"] == 0.6
    assert (point["low"], point["high"]) != wilson(6, 10)


def test_methods_join_their_budgets(measurements):
    data = quality_bytes.data(measurements)
    assert data["methods"] == {"KIVI(bits=4)": 0, "SnapKV": 1}
    ordered = quality_bytes.data(measurements, order=("H2O", "SnapKV"))
    assert ordered["methods"] == {"SnapKV": 1, "KIVI(bits=4)": 2}


@pytest.mark.parametrize(
    ("label", "method"),
    [
        ("SnapKV(budget=0.25)", "SnapKV"),
        ("SnapKV(budget=0.25) | KIVI(bits=4)", "SnapKV | KIVI(bits=4)"),
        ("KeyDiff(budget=0.5, sinks=4)", "KeyDiff(sinks=4)"),
        ("Auto(budget=14745690, context=1153) | SnapKV(budget=0.25)", "Auto | SnapKV"),
        ("PrefixKV(budget='1MiB')", "PrefixKV"),
        ("KIVI(bits=4)", "KIVI(bits=4)"),
        ("kvpress KeyDiff 25%", "kvpress KeyDiff"),
        ("transformers quanto 4-bit", "transformers quanto"),
    ],
)
def test_a_method_is_a_policy_without_its_budgets(label, method):
    assert method_of(label) == method


def test_below_the_ceiling_nobody_is_ranked(retrieval):
    group = [retrieval("Full()", hits=7), retrieval("KIVI(bits=4)", hits=9)]
    data = quality_bytes.data(group)
    assert data["panels"][0]["below_ceiling"]
    figure = quality_bytes.draw(data)
    axes = figure.axes[0]
    assert {line.get_color() for line in axes.lines} == {canvas.GREY}
    assert "below ceiling: dense under 80%" in axes.texts[0].get_text()
    data = quality_bytes.data([retrieval("Full()", hits=8), retrieval("KIVI(bits=4)", hits=9)])
    assert not data["panels"][0]["below_ceiling"]


def test_what_is_rounding_is_at_the_edge(fidelity):
    labels = ("Full()", "KIVI(bits=4)", "SnapKV(budget=0.5)")
    panel = quality_bytes.data([fidelity(label) for label in labels])["panels"][0]
    # the next power of ten below 1e-3, whose logarithm is rounded
    assert panel["edge"] in (1e-3, 1e-4)
    assert panel["note"] == "log scale; less, as dense, is at the edge"
    figure = quality_bytes.draw(quality_bytes.data([fidelity(label) for label in labels]))
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].get_ylim()[0] == pytest.approx(panel["edge"])


def test_without_the_dense_cache_there_is_nothing_to_draw(fidelity, retrieval):
    with pytest.raises(InputError, match=r"perplexity: the dense cache was not measured"):
        quality_bytes.data([fidelity("KIVI(bits=4)")])
    group = [fidelity("KIVI(bits=4)"), retrieval("Full()"), retrieval("KIVI(bits=4)")]
    data = quality_bytes.data(group)
    assert data["left_out"] == ["perplexity"]
    assert [panel["task"] for panel in data["panels"]] == ["needle-prose"]


def test_panels_of_one_task_are_told_apart(retrieval):
    group = [retrieval(label) for label in ("Full()", "KIVI(bits=4)")]
    seen = {"question": "visible", "template_sha256": "0123"}
    group += [replace(one, setting=replace(one.setting, options=seen)) for one in group]
    titles = [panel["title"] for panel in quality_bytes.data(group)["panels"]]
    assert titles == ["needle-prose, hidden", "needle-prose, visible"]


def test_a_panel_that_lacks_a_method_keeps_its_place(retrieval):
    """A line without points took room from there to the corner of the figure."""
    seen = {"question": "visible", "template_sha256": "0123"}
    group = [retrieval(label) for label in ("Full()", "KIVI(bits=4)")]
    others = [retrieval(label) for label in ("Full()", "SnapKV(budget=0.25)")]
    group += [replace(one, setting=replace(one.setting, options=seen)) for one in others]
    figure = quality_bytes.draw(quality_bytes.data(group))
    # matplotlib warns where nothing is left for the axes, and warnings are errors
    figure.draw_without_rendering()
    assert all(axes.get_position().width > 0.3 for axes in figure.axes)


def test_twelve_methods_are_twelve_pens():
    pens = [canvas.pen(number) for number in range(12)]
    assert len({(pen.colour, pen.marker) for pen in pens}) == 12
    assert len({pen.marker for pen in pens}) == 12
