"""What the planner decides: one format and schedule per site, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvfx import KIVI, Full, PerLayer, StreamingLLM
from kvfx.errors import PolicyError, UnsupportedShape
from kvfx.geometry import Causal, Rope, Site, Window
from kvfx.planner import Schedule, make_plan
from kvfx.policies import WindowRing

ROPE = Rope("half", tuple(10000.0 ** (-i / 32) for i in range(32)))
SITE = Site(
    0, "layers.0.attn", 9, 3, 64, 64, 0.125, Causal(), ROPE, torch.float32, torch.device("cpu")
)


def sites(*changes: dict[str, object]) -> tuple[Site, ...]:
    """Sites like `SITE`, one per dict of changes."""
    return tuple(
        replace(SITE, index=index, name=f"layers.{index}.attn", **change)
        for index, change in enumerate(changes)
    )


THREE = sites({}, {}, {})


def test_a_policy_holds_everywhere():
    plan = make_plan(StreamingLLM() | KIVI(4), THREE)
    assert [site.store for site in plan.sites] == [KIVI(4)] * 3
    assert [site.select for site in plan.sites] == [StreamingLLM()] * 3
    assert plan.sites[0].methods == "StreamingLLM | KIVI"
    assert plan.sites[0].rule == repr(StreamingLLM() | KIVI(4))


def test_a_selection_alone_stores_dense_entries():
    plan = make_plan(StreamingLLM(), THREE)
    assert [site.store for site in plan.sites] == [Full()] * 3


def test_a_window_keeps_a_ring_and_says_so():
    plan = make_plan(KIVI(2), sites({"mask": Window(16)}, {}))
    assert [site.store for site in plan.sites] == [WindowRing(16), KIVI(2)]
    assert plan.sites[0].note == "the model sees 16 tokens: lossless ring"


def test_layers_are_counted_from_both_ends():
    plan = make_plan(PerLayer(KIVI(2), {0: Full(), -1: StreamingLLM() | KIVI(8)}), THREE)
    assert [site.store for site in plan.sites] == [Full(), KIVI(2), KIVI(8)]
    assert [site.select for site in plan.sites] == [None, None, StreamingLLM()]


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_does_not_exist_is_named(layer):
    with pytest.raises(PolicyError, match=f"layer {layer} does not exist, the model has 3 sites"):
        make_plan(PerLayer(Full(), {layer: KIVI()}), THREE)


UNFIT = {
    "head_dim 48 is not a multiple of group_size 32": (KIVI(), {"head_dim": 48}),
    "value_dim 40 is not a multiple of group_size 32": (KIVI(), {"value_dim": 40}),
    "no rotary embedding was matched": (StreamingLLM(), {"rope": None}),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_a_site_that_does_not_fit_is_named_with_reason_and_remedy(reason):
    policy, change = UNFIT[reason]
    with pytest.raises(UnsupportedShape) as caught:
        make_plan(policy, sites({}, change))
    assert str(caught.value).startswith(f"layers.1.attn: {policy!r} does not fit: {reason}")
    assert "strict=False keeps such sites dense" in str(caught.value)


@pytest.mark.parametrize("reason", UNFIT)
def test_not_strict_keeps_such_a_site_dense_and_says_so(reason):
    policy, change = UNFIT[reason]
    plan = make_plan(policy, sites({}, change), strict=False)
    assert plan.sites[0].note == ""
    assert (plan.sites[1].store, plan.sites[1].select) == (Full(), None)
    assert plan.sites[1].note.startswith(f"dense: {reason}")


def test_absolute_positions_need_no_rotary_embedding():
    plan = make_plan(StreamingLLM(positions="absolute"), sites({"rope": None}))
    assert plan.sites[0].select is not None


@pytest.mark.parametrize(
    ("policy", "compacts", "selects", "croppable"),
    [
        (Full(), False, False, True),
        (KIVI(), True, False, False),
        (StreamingLLM(), True, True, False),
        (PerLayer(Full(), {1: KIVI()}), True, False, False),
    ],
    ids=repr,
)
def test_what_a_plan_needs(policy, compacts, selects, croppable):
    plan = make_plan(policy, THREE)
    assert (plan.compacts, plan.selects, plan.croppable) == (compacts, selects, croppable)


def test_a_ring_forgets_and_cannot_be_cropped():
    assert not make_plan(Full(), sites({}, {"mask": Window(16)})).croppable


def test_eviction_is_due_at_budget_plus_interval():
    schedule = Schedule(Full(), StreamingLLM(budget=0.25, interval=16))
    assert schedule.kept(100, 100) == 25
    assert [n for n in range(60) if schedule.due(n, 100)] == list(range(41, 60))
    assert schedule.capacity(25, 100) == schedule.capacity(40, 100) == 41


def test_a_small_count_is_not_lowered_by_a_short_prompt():
    # 3 tokens were read, 7 entries are asked for: later tokens fill them up
    schedule = Schedule(Full(), StreamingLLM(budget=7, interval=16))
    assert schedule.kept(3, 3) == 3
    assert [n for n in range(30) if schedule.due(n, 3)] == list(range(23, 30))


def test_nothing_is_due_in_a_dense_cache():
    schedule = Schedule(Full(), None)
    assert not any(schedule.due(n, 100) for n in range(600))
    assert [schedule.capacity(n, 100) for n in (1, 256, 257)] == [256, 256, 512]
