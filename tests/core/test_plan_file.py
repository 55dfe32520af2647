"""A plan as a file is the same plan, or an error that says what differs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from kvfx import D2O, KIVI, Full, KVMerger, PerLayer, SnapKV, StreamingLLM
from kvfx.errors import InputError, PolicyError
from kvfx.geometry import Causal, Rope, Site, Unproven, Window
from kvfx.plan_file import load_plan, move_plan, save_plan
from kvfx.planner import make_plan
from kvfx.policies import PRESETS
from kvfx.policies.layer_budgets import LayerBudgets

ROPE = Rope("half", tuple(10000.0 ** (-i / 32) for i in range(32)))
SITE = Site(
    0, "layers.0.attn", 9, 3, 64, 64, 0.125, Causal(), ROPE, torch.float32, torch.device("cpu")
)
CHANGES = ({}, {"mask": Window(100)}, {"head_dim": 48}, {"kv_heads": 1}, {"rope": None})
SITES = tuple(
    replace(SITE, index=index, name=f"layers.{index}.attn", **change)
    for index, change in enumerate(CHANGES)
)
EVEN = tuple(replace(SITE, index=index, name=f"layers.{index}.attn") for index in range(4))
POLICIES = {
    **PRESETS,
    "per layer": PerLayer(KIVI(2), {0: Full(), -1: SnapKV(budget=0.1) | KIVI(4)}),
    "outer layers": KVMerger(budget=0.9, skip_layers=True),
    "two roles": D2O(budget=1 / 3),
    "count": StreamingLLM(budget=512),
    "layers": LayerBudgets(0.25, (0.1, 1.0, 1 / 3, 2.5)) | SnapKV(),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_plan_comes_back(name, tmp_path):
    plan = make_plan(POLICIES[name], EVEN)
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json", EVEN) == plan


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "layers"])
def test_windows_and_sites_that_stay_dense_come_back_with_their_notes(name, tmp_path):
    sites = (*SITES, replace(SITE, index=5, name="layers.5.attn", mask=Unproven("odd")))
    plan = make_plan(POLICIES[name], sites, strict=False)
    save_plan(plan, tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json", sites)
    assert loaded == plan
    assert [site.note for site in loaded.sites] == [site.note for site in plan.sites]
    # a policy in two roles is one object: passes ask whether it is
    for site in loaded.sites:
        assert (site.merge is site.select) == (site.merge == site.select)


def test_what_was_measured_is_in_the_file(tmp_path):
    plan = make_plan(POLICIES["layers"], EVEN)
    save_plan(plan, tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json", EVEN)
    assert [site.share for site in loaded.sites] == [site.share for site in plan.sites]
    assert loaded.sites[2].share.shares == (0.1, 1.0, 1 / 3, 2.5)


def test_equal_plans_are_equal_files_that_can_be_read(tmp_path):
    for name in ("a.json", "b.json"):
        save_plan(make_plan(PRESETS["streaming-25%|k8v4"], EVEN), tmp_path / name)
    text = (tmp_path / "a.json").read_text("utf-8")
    assert text == (tmp_path / "b.json").read_text("utf-8")
    document = json.loads(text)
    assert document["sites"][3] == {
        "name": "layers.3.attn",
        "heads": 9,
        "kv_heads": 3,
        "head_dim": 64,
        "value_dim": 64,
        "dtype": "float32",
        "mask": "causal",
        "rope": "half 64",
        "policy": repr(PRESETS["streaming-25%|k8v4"]),
        "note": "",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "h.2.attn"}, "name is 'h.2.attn', the file says 'layers.2.attn'"),
        ({"kv_heads": 9}, "kv_heads is 9, the file says 3"),
        ({"head_dim": 128}, "head_dim is 128, the file says 64"),
        ({"value_dim": 32}, "value_dim is 32, the file says 64"),
        ({"heads": 6}, "heads is 6, the file says 9"),
        ({"dtype": torch.bfloat16}, "dtype is 'bfloat16', the file says 'float32'"),
        ({"mask": Window(7)}, "mask is 'window 7', the file says 'causal'"),
        ({"rope": None}, "rope is 'none', the file says 'half 64'"),
    ],
    ids=str,
)
def test_another_model_is_refused(change, message, tmp_path):
    plan = make_plan(SnapKV(), EVEN)
    save_plan(plan, tmp_path / "plan.json")
    sites = (*EVEN[:2], replace(EVEN[2], **change), EVEN[3])
    for ask in (lambda: load_plan(tmp_path / "plan.json", sites), lambda: move_plan(plan, sites)):
        with pytest.raises(InputError, match=f"is of another model: {sites[2].name}: .*{message}"):
            ask()


def test_facts_that_no_buffer_knows_may_differ(tmp_path):
    # another copy of the model, on another device
    save_plan(make_plan(SnapKV(), EVEN), tmp_path / "plan.json")
    sites = tuple(replace(site, device=torch.device("meta"), scale=0.5) for site in EVEN)
    assert load_plan(tmp_path / "plan.json", sites) == make_plan(SnapKV(), sites)


def test_another_number_of_layers_is_refused(tmp_path):
    save_plan(make_plan(Full(), EVEN), tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"plan\.json is for 4 sites, the model has 3"):
        load_plan(tmp_path / "plan.json", EVEN[:3])


TAMPERED = {
    "it does not say kvfx_plan": lambda document: document.pop("kvfx_plan"),
    "has format 2, this version reads 1": lambda document: document.update(kvfx_plan=2),
    "policy is None": lambda document: document.pop("policy"),
    "policy is 3, not the text": lambda document: document.update(policy=3),
    "there is no method 'SnapVK': did you mean SnapKV": lambda document: document.update(
        policy="SnapVK()"
    ),
    "not an expression": lambda document: document.update(policy="SnapKV(budget="),
    "there is no method 'open'": lambda document: document.update(
        policy="SnapKV(budget=open('x'))"
    ),
    "fraction must satisfy": lambda document: document.update(policy="SnapKV(budget=2.0)"),
    # the policy says one thing, rows another
    "is not the plan of layers.0.attn: policy is": lambda document: document.update(
        policy="SnapKV(budget=0.5)"
    ),
    "is not the plan of layers.2.attn: policy is": lambda document: document["sites"][2].update(
        policy="Full()"
    ),
    "layers.1.attn: note is '', the file says 'dense'": lambda document: document["sites"][
        1
    ].update(note="dense"),
    "layers.3.attn: kv_heads is 3, the file says None": lambda document: document["sites"][3].pop(
        "kv_heads"
    ),
    "is for 3 sites": lambda document: document["sites"].pop(),
    "sites is not a list": lambda document: document.update(sites={}),
    "not a list of one object per site": lambda document: document["sites"].append("site"),
}


@pytest.mark.parametrize("message", TAMPERED)
def test_a_changed_file_is_refused(message, tmp_path):
    path = tmp_path / "plan.json"
    save_plan(make_plan(SnapKV(), EVEN), path)
    document = json.loads(path.read_text("utf-8"))
    TAMPERED[message](document)
    path.write_text(json.dumps(document), "utf-8")
    with pytest.raises(InputError, match=r"plan\.json") as caught:
        load_plan(path, EVEN)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b'{"kvfx_plan": 1', b"[1]", b"null", b"\xff\xfe"])
def test_what_is_no_plan_is_refused(content, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"plan\.json (cannot be read as a plan|is no plan)"):
        load_plan(path, EVEN)
    with pytest.raises(InputError, match=r"missing\.json cannot be read as a plan"):
        load_plan(tmp_path / "missing.json", EVEN)


def test_a_plan_that_its_policy_does_not_spell_is_not_written(tmp_path):
    path = tmp_path / "plan.json"
    save_plan(make_plan(Full(), EVEN), path)
    before = path.read_bytes()
    plan = make_plan(SnapKV(), EVEN)
    other = replace(plan, sites=(replace(plan.sites[0], store=KIVI()), *plan.sites[1:]))
    with pytest.raises((PolicyError, InputError), match=r"is not the plan|does not spell"):
        save_plan(other, path)
    assert path.read_bytes() == before


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    save_plan(make_plan(Full(), EVEN), path)
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("kvfx.plan_file.os.replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_plan(make_plan(KIVI(), EVEN), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
