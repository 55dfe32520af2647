"""The cost model says to the byte what is allocated."""

from __future__ import annotations

from functools import cache

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvfx
from kvfx import KIVI, Full, PerLayer, StreamingLLM
from kvfx.geometry import Causal, Mask, Site, Window
from kvfx.memory import memory_bytes, memory_formula, site_formula
from kvfx.plan import make_plan
from kvfx.runtime import State
from kvfx.testing.tiny import left_padded, tiny_gemma3, tiny_llama

CAUSAL = Causal()
POLICIES = {
    "full": Full(),
    "kivi 2": KIVI(2),
    "kivi 4 published": KIVI(4, mode="kivi", residual=64),
    "k8v4": KIVI(k_bits=8, v_bits=4, residual=32),
    "streaming": StreamingLLM(positions="absolute"),
    "streaming 40": StreamingLLM(budget=40, interval=3, positions="absolute"),
    "streaming kivi": StreamingLLM(budget=0.5, positions="absolute") | KIVI(4),
    "per layer": PerLayer(KIVI(2), {0: Full()}),
}


def site(index: int = 0, kv_heads: int = 3, head_dim: int = 64, mask: Mask = CAUSAL) -> Site:
    """A site of nine query heads in fp32."""
    device = torch.device("cpu")
    name = f"layers.{index}"
    return Site(
        index, name, 9, kv_heads, head_dim, head_dim, 0.1, mask, None, torch.float32, device
    )


SITES = (site(0), site(1, kv_heads=1), site(2, mask=Window(100)), site(3, head_dim=128))


@given(st.sampled_from(list(POLICIES)), st.integers(1, 4), st.integers(1, 900))
def test_bytes_are_what_is_allocated(name, batch, length):
    plan = make_plan(POLICIES[name], SITES)
    state = State(plan, batch, None)
    state.admit(length, [length] * batch, [length] * batch)
    assert state.nbytes() == memory_bytes(plan, batch, length)
    assert state.nbytes() == sum(t.numel() * t.element_size() for t in state.tensors())


@given(st.sampled_from(list(POLICIES)), st.integers(1, 4), st.integers(1, 900))
def test_the_formula_gives_the_same(name, batch, length):
    plan = make_plan(POLICIES[name], SITES)
    schedules = list(dict.fromkeys(part.schedule for part in plan.sites))
    capacities = {
        f"capacity_{index}": schedule.capacity(schedule.kept(length, length), length)
        for index, schedule in enumerate(schedules)
    }
    values = {"batch": batch, **capacities}
    formula = memory_formula(plan)
    assert {symbol.name for symbol in formula.free_symbols} <= set(values)
    exact = formula.subs({symbol: values[symbol.name] for symbol in formula.free_symbols})
    assert exact == memory_bytes(plan, batch, length)


@cache
def fast(name: str, policy: str):
    """A tiny model under a policy."""
    model = tiny_gemma3(window=100) if name == "gemma3" else tiny_llama(head_dim=32)
    return kvfx.compress(model, POLICIES[policy], compile=False, verify=False)


@pytest.mark.parametrize("lengths", [(1,), (300,), (40, 257)], ids=str)
@pytest.mark.parametrize(
    ("name", "policy"),
    [("gemma3", "full"), ("gemma3", "streaming 40"), *(("llama", policy) for policy in POLICIES)],
)
def test_a_model_says_what_a_prompt_will_cost(name, policy, lengths):
    model = fast(name, policy)
    prompt = left_padded(lengths)
    before = model.memory(batch=len(lengths), length=max(lengths))
    past = model(**prompt, logits_to_keep=1).past_key_values
    assert past.nbytes() == before


def test_one_kind_of_site_has_one_capacity():
    formula = memory_formula(make_plan(Full(), (site(0), site(1))))
    batch, capacity = (
        sympy.Symbol(name, positive=True, integer=True) for name in ("batch", "capacity")
    )
    # 2 sites, K and V of 3 heads of 64 fp32 channels; a length of int32 per head
    assert sympy.expand(formula - 2 * (2 * 3 * 64 * 4 * capacity * batch + 3 * 4 * batch)) == 0


@pytest.mark.parametrize("mode", ["kivi", "window"])
def test_two_bits_need_less_than_15_percent_of_the_dense_cache(mode):
    sites = tuple(site(index) for index in range(30))
    dense = memory_bytes(make_plan(Full(), sites), 1, 4096)
    assert dense == 30 * (2 * 3 * 4096 * 64 * 4 + 3 * 4)
    assert memory_bytes(make_plan(KIVI(2, mode=mode), sites), 1, 4096) <= 0.15 * dense


def test_an_evicted_cache_needs_its_budget_and_interval():
    plan = make_plan(StreamingLLM(budget=0.25, interval=64, positions="absolute"), (site(),))
    per_entry = 2 * 3 * 64 * 4
    assert memory_bytes(plan, 1, 4096) == (1024 + 64) * per_entry + 3 * 4


def test_a_site_is_the_sum_of_its_buffers():
    part = make_plan(KIVI(2), (site(),)).sites[0]
    buffers = part.store.buffers(part.site).values()
    assert sympy.expand(site_formula(part) - sum(buffer.bytes() for buffer in buffers)) == 0
