"""PerLayer: the right policy at the right site, and layers that do not exist are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvfx.errors import PolicyError
from kvfx.geometry import Causal, Site
from kvfx.planner import make_plan
from kvfx.policies import KIVI, Full, PerLayer, StreamingLLM

SITE = Site(0, "s0", 4, 2, 32, 32, 0.25, Causal(), None, torch.float32, torch.device("cpu"))
SITES = tuple(replace(SITE, index=index, name=f"s{index}") for index in range(4))


@pytest.mark.parametrize(
    ("layers", "exact"),
    [({}, []), ({0: Full(), -1: Full()}, [0, 3]), ({-4: Full()}, [0]), ({2: Full()}, [2])],
    ids=str,
)
def test_layers(layers, exact):
    plan = make_plan(PerLayer(KIVI(bits=2), layers), SITES)
    assert [i for i, site in enumerate(plan.sites) if isinstance(site.store, Full)] == exact
    assert all(site.store == KIVI(bits=2) for i, site in enumerate(plan.sites) if i not in exact)


@pytest.mark.parametrize("index", [4, -5])
def test_a_layer_that_does_not_exist_is_refused(index):
    message = rf"PerLayer: layer {index} does not exist, the model has 4 sites"
    with pytest.raises(PolicyError, match=message):
        make_plan(PerLayer(Full(), {index: KIVI()}), SITES)


def test_it_plays_the_roles_of_all_its_layers():
    select = StreamingLLM(positions="absolute")
    composed = PerLayer(select, {0: StreamingLLM(budget=1.0, positions="absolute")}) | KIVI()
    assert composed.roles() == ("select", "store")
    plan = make_plan(composed, SITES)
    assert [site.select.budget for site in plan.sites] == [1.0, 0.25, 0.25, 0.25]
    with pytest.raises(PolicyError, match="both play the role 'store'"):
        PerLayer(Full()) | KIVI()
    with pytest.raises(PolicyError, match="both play the role 'store'"):
        PerLayer(StreamingLLM(), {0: Full()}) | KIVI()


def test_nested():
    inner = PerLayer(KIVI(bits=4), {1: KIVI(bits=8)})
    plan = make_plan(PerLayer(inner, {0: Full()}), SITES)
    assert [site.store for site in plan.sites] == [Full(), KIVI(bits=8), KIVI(bits=4), KIVI(bits=4)]


def test_repr_and_hash():
    policy = PerLayer(default=KIVI(bits=2), layers={0: Full(), -1: Full()})
    assert eval(repr(policy)) == policy
    assert hash(policy) == hash(PerLayer(KIVI(bits=2), {-1: Full(), 0: Full()}))
