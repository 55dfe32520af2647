"""The bars are what the plan keeps."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from kvfx import KIVI, DBudgetKV, Full, PerLayer, PyramidKV, SnapKV
from kvfx.errors import InputError
from kvfx.figures import layer_budgets
from kvfx.geometry import Causal, Rope, Site, Window
from kvfx.plan_file import save_plan
from kvfx.planner import make_plan
from kvfx.policies import PRESETS
from kvfx.policies.layer_budgets import LayerBudgets

pytest.importorskip("matplotlib", reason="pip install matplotlib")

ROPE = Rope("half", tuple(10000.0 ** (-i / 32) for i in range(32)))
SITE = Site(
    0, "layers.0.attn", 8, 2, 64, 64, 0.125, Causal(), ROPE, torch.float32, torch.device("cpu")
)
SITES = tuple(replace(SITE, index=index, name=f"layers.{index}.attn") for index in range(4))
POLICIES = {
    **PRESETS,
    "pyramid": PyramidKV(budget=0.25) | KIVI(4),
    "shares": LayerBudgets(300, (0.1, 1.0, 1 / 3, 2.5)) | SnapKV(),
    "told by the data": DBudgetKV(),
    "per layer": PerLayer(KIVI(2), {0: Full(), -1: SnapKV(budget=0.1) | KIVI(4)}),
}


def drawn(policy, sites, path):
    """The plan, and what is drawn of its file."""
    plan = make_plan(policy, sites)
    save_plan(plan, path / "plan.json")
    document = json.loads((path / "plan.json").read_text())
    return plan, layer_budgets.data(document, "plan.json", tokens=1000)


@pytest.mark.parametrize("name", POLICIES)
def test_entries_are_those_of_the_plan(name, tmp_path):
    plan, data = drawn(POLICIES[name], SITES, tmp_path)
    for site, shown in zip(plan.sites, data["sites"], strict=True):
        known = None if site.schedule.measured else int(site.schedule.kept(1000, 1000))
        assert shown["entries"] == known
        assert shown["name"] == site.site.name


def test_shares_sum_to_the_budget(tmp_path):
    _, data = drawn(POLICIES["pyramid"], SITES, tmp_path)
    entries = [site["entries"] for site in data["sites"]]
    assert sum(entries) == 4 * 250
    assert entries == sorted(entries, reverse=True)
    assert {site["store"] for site in data["sites"]} == {"KIVI(bits=4)"}


def test_stores_are_told_apart(tmp_path):
    _, data = drawn(POLICIES["per layer"], SITES, tmp_path)
    stores = [site["store"] for site in data["sites"]]
    assert stores == ["Full()", "KIVI(bits=2)", "KIVI(bits=2)", "KIVI(bits=4)"]
    legend = layer_budgets.draw(data).legends[0]
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["Full()", "KIVI(bits=2)", "KIVI(bits=4)", "all tokens"]


def test_windows_and_readers(tmp_path):
    sites = (*SITES[:2], replace(SITES[2], mask=Window(100)), replace(SITES[3], reads=1))
    _, data = drawn(SnapKV(budget=0.25), sites, tmp_path)
    assert [site["entries"] for site in data["sites"]] == [250, 250, 100, 0]
    assert data["sites"][3]["store"] == "no cache of its own"


def test_the_bars_are_the_data(tmp_path):
    _, data = drawn(POLICIES["shares"], SITES, tmp_path)
    axes = layer_budgets.draw(data).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [site["entries"] for site in data["sites"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "LayerBudgets(0.5, (1.0,)) | SnapKV()"}, "1 shares for 2 sites"),
        ({"policy": "Snap()"}, "there is no method 'Snap'"),
        ({"sites": [{"name": "a"}]}, "plan again"),
    ],
)
def test_a_plan_that_cannot_be_read_says_so(change, message):
    row = {"name": "a", "policy": "SnapKV() | Full()", "note": ""}
    document = {"kvfx_plan": 1, "policy": "SnapKV()", "sites": [row, row], **change}
    with pytest.raises(InputError, match=message) as caught:
        layer_budgets.data(document, "mine.json")
    assert str(caught.value).startswith("mine.json: ")
