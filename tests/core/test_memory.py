"""The cost model says to the byte what is allocated, and what fits into a memory."""

from __future__ import annotations

from functools import cache

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvfx
from kvfx import KIVI, AdaKV, CaM, ChunkKV, Full, KVCrush, KVMerger, PerLayer, SnapKV, StreamingLLM
from kvfx.cache import BATCH
from kvfx.errors import CapacityExceeded, PolicyError
from kvfx.geometry import Causal, Mask, Rope, Site, Unproven, Window
from kvfx.memory import (
    LENGTH,
    NEW,
    fitting_budget,
    is_exact,
    largest_batch,
    largest_context,
    memory_bytes,
    memory_formula,
    site_bytes,
    site_formula,
)
from kvfx.planner import Plan, make_plan
from kvfx.policies import D2O, PRESETS, TOVA, KNorm, WeightedKV
from kvfx.policies.layer_budgets import LayerBudgets
from kvfx.runtime import State
from kvfx.testing.tiny import left_padded, tiny_gemma3, tiny_llama

CAUSAL = Causal()
ROPE = Rope("half", (1.0, 0.1))
SHARES = (0.4, 1.7, 0.0, 0.9)
POLICIES = {
    **PRESETS,
    "kivi 4 published": KIVI(4, mode="kivi", residual=64),
    "k8v4 short": KIVI(k_bits=8, v_bits=4, residual=32),
    "kivi groups of 64": KIVI(4, group_size=64, residual=64),
    "streaming 40": StreamingLLM(budget=40, interval=3),
    "streaming 7%": StreamingLLM(budget=0.07, interval=1),
    "streaming kivi published": StreamingLLM(budget=0.5) | KIVI(4, mode="kivi", residual=64),
    "tova": TOVA(),
    "knorm": KNorm(),
    "chunks of 7": ChunkKV(budget=0.3, chunk=7, interval=5),
    "crush alone": KVCrush(),
    "ada kv and crush": SnapKV(0.3) | AdaKV() | KVCrush(),
    "cam": StreamingLLM(budget=0.2) | CaM(),
    "d2o": D2O(),
    "weighted": WeightedKV(),
    "merger of the inner layers": KVMerger(0.9, skip_layers=True, rotation="before"),
    "votes": KVMerger(0.5, value_scale="votes"),
    "per layer": PerLayer(KIVI(2), {0: Full(), -1: SnapKV(0.2)}),
    "layer budgets": LayerBudgets(0.25, SHARES) | SnapKV(),
    "layer counts": LayerBudgets(60, SHARES) | StreamingLLM() | KIVI(4),
}
MEASURED = {
    "threshold": KVMerger(mode="threshold", interval=5),
    "nothing merges": KVMerger(mode="threshold", threshold=2.0, interval=5),
}


def site(index: int = 0, kv_heads: int = 3, head_dim: int = 64, mask: Mask = CAUSAL) -> Site:
    """A site of nine query heads in fp32."""
    device = torch.device("cpu")
    name = f"layers.{index}"
    return Site(
        index, name, 9, kv_heads, head_dim, head_dim, 0.1, mask, ROPE, torch.float32, device
    )


SITES = (site(0), site(1, kv_heads=1), site(2, mask=Window(100)), site(3, head_dim=128))
EQUAL = tuple(site(index) for index in range(4))


def allocated(
    plan: Plan, batch: int, length: int, new: int = 0, max_length: int | None = None
) -> int:
    """Bytes of the buffers after a prompt and `new` steps, which never held more on the way."""
    state = State(plan, batch, max_length)
    most = 0
    for tokens in (length, *(1 for _ in range(new))):
        prompt = [length] * batch if tokens == length and state.columns == 0 else None
        state.admit(tokens, [tokens] * batch, prompt)
        if state.due():
            state.compacted()
        most = max(most, state.nbytes())
    assert state.nbytes() == sum(t.numel() * t.element_size() for t in state.tensors())
    assert most == state.nbytes()
    return most


@pytest.mark.parametrize("name", POLICIES)
@given(st.integers(1, 4), st.integers(1, 900), st.integers(0, 100))
def test_bytes_are_what_is_allocated(name, batch, length, new):
    plan = make_plan(POLICIES[name], SITES)
    assert is_exact(plan)
    assert allocated(plan, batch, length, new) == memory_bytes(plan, batch, length, new)
    assert memory_bytes(plan, batch, length, new) == sum(
        site_bytes(part, batch, length, new) for part in plan.sites
    )


@pytest.mark.parametrize("name", POLICIES)
@given(st.integers(1, 900), st.integers(0, 100), st.integers(0, 100))
def test_a_conversation_that_is_bounded_gets_what_it_needs(name, length, new, more):
    plan, most = make_plan(POLICIES[name], SITES), length + new + more
    size = memory_bytes(plan, 2, length, new, most)
    assert allocated(plan, 2, length, new, most) == size
    assert size <= memory_bytes(plan, 2, length, new)
    formula = memory_formula(plan, most)
    assert formula.subs({BATCH: 2, LENGTH: length, NEW: new}) == size


def test_a_bounded_dense_cache_has_an_entry_per_token():
    plan = make_plan(Full(), EQUAL)
    entry = len(EQUAL) * 2 * 3 * 64 * 4
    counters = len(EQUAL) * 3 * 4
    assert memory_bytes(plan, 1, 300, 10, 310) == 310 * entry + counters


@pytest.mark.parametrize("name", {**POLICIES, **MEASURED})
@given(st.integers(1, 4), st.integers(1, 10**6), st.integers(0, 10**5))
def test_the_formula_gives_the_same(name, batch, length, new):
    plan = make_plan({**POLICIES, **MEASURED}[name], SITES)
    formula = memory_formula(plan)
    assert formula.free_symbols <= {BATCH, LENGTH, NEW}
    exact = formula.subs({BATCH: batch, LENGTH: length, NEW: new})
    assert exact == memory_bytes(plan, batch, length, new)


@given(st.floats(2**-20, 1.0), st.integers(1, 10**9))
def test_the_formula_rounds_fractions_as_programs_do(budget, length):
    # 0.07 * 100 is above 7 in doubles, 0.2 * 5 is not above 1
    for fraction, tokens in ((budget, length), (0.07, 100), (0.2, 5)):
        plan = make_plan(KNorm(budget=fraction), (site(),))
        assert memory_formula(plan).subs({BATCH: 1, LENGTH: tokens}) == memory_bytes(
            plan, 1, tokens
        )


@cache
def fast(name: str, policy: str):
    """A tiny model under a policy."""
    model = tiny_gemma3(window=100) if name == "gemma3" else tiny_llama(layers=4, head_dim=32)
    chosen = {**POLICIES, **MEASURED}[policy]
    return kvfx.compress(model, chosen, compile=False, verify=False)


def held(model, lengths: tuple[int, ...], new: int) -> list[int]:
    """Bytes after a prompt, and after each of `new` steps."""
    past = model(**left_padded(lengths), logits_to_keep=1).past_key_values
    sizes = [past.nbytes()]
    for step in range(new):
        token = torch.full((len(lengths), 1), 3 + step % 90)
        model(input_ids=token, past_key_values=past)
        sizes.append(past.nbytes())
    return sizes


# groups of 64 channels do not fit a head of 32, votes and turned keys are the same bytes
RUN = [policy for policy in POLICIES if policy != "kivi groups of 64"]


@pytest.mark.parametrize(
    ("name", "policy"),
    [("gemma3", "full"), ("gemma3", "streaming 40"), *(("llama", policy) for policy in RUN)],
)
def test_a_model_says_what_a_conversation_will_cost(name, policy):
    model = fast(name, policy)
    for lengths, new in (((257,), 3), ((40, 190), 70)):
        sizes = held(model, lengths, new)
        expected = [model.memory(len(lengths), max(lengths), step) for step in range(new + 1)]
        assert sizes == expected


@pytest.mark.parametrize("policy", MEASURED)
def test_what_the_data_decide_is_bounded(policy):
    model = fast("llama", policy)
    assert not is_exact(model.plan)
    sizes = held(model, (30, 70), 40)
    bounds = [model.memory(2, 70, step) for step in range(41)]
    assert all(size <= bound for size, bound in zip(sizes, bounds, strict=True))
    # and no bound is lower: nothing merges, and every fifth token evicts
    if policy == "nothing merges":
        assert sizes[::5] == bounds[::5]
    else:
        assert sizes[0] < bounds[0]


def test_one_kind_of_site_is_one_term():
    formula = memory_formula(make_plan(Full(), (site(0), site(1))))
    # 2 sites, K and V of 3 heads of 64 fp32 channels; a length of int32 per head
    capacity = 256 * sympy.ceiling(sympy.Max(1, LENGTH + NEW) / 256)
    assert sympy.expand(formula - 2 * (2 * 3 * 64 * 4 * capacity * BATCH + 3 * 4 * BATCH)) == 0


def test_a_formula_can_be_read():
    formula = memory_formula(make_plan(StreamingLLM(budget=0.25), (site(),)))
    assert str(formula) == "1536*batch*(Max(5, ceiling(0.25*length)) + 64) + 12*batch"


def test_a_site_that_is_not_proven_is_dense():
    plan = make_plan(KIVI(2), (site(mask=Unproven("odd")),), strict=False)
    assert memory_bytes(plan, 2, 300, 213) == allocated(plan, 2, 300, 213)
    assert memory_bytes(plan, 2, 300, 212) == memory_bytes(make_plan(Full(), (site(),)), 2, 512)


@pytest.mark.parametrize("mode", ["kivi", "window"])
def test_two_bits_need_less_than_15_percent_of_the_dense_cache(mode):
    sites = tuple(site(index) for index in range(30))
    dense = memory_bytes(make_plan(Full(), sites), 1, 4096)
    assert dense == 30 * (2 * 3 * 4096 * 64 * 4 + 3 * 4)
    assert memory_bytes(make_plan(KIVI(2, mode=mode), sites), 1, 4096) <= 0.15 * dense


def test_an_evicted_cache_needs_its_budget_and_interval():
    plan = make_plan(StreamingLLM(budget=0.25, interval=64), (site(),))
    per_entry = 2 * 3 * 64 * 4
    assert memory_bytes(plan, 1, 4096, 9999) == (1024 + 64) * per_entry + 3 * 4


def test_a_site_is_the_sum_of_its_buffers():
    part = make_plan(KIVI(2), (site(),)).sites[0]
    buffers = part.store.buffers(part.site).values()
    assert sympy.expand(site_formula(part) - sum(buffer.bytes() for buffer in buffers)) == 0


GROWS = [name for name in POLICIES if name not in ("streaming 40", "layer counts")]


@pytest.mark.parametrize("name", GROWS)
@settings(max_examples=5)
@given(st.integers(1, 3), st.integers(0, 40), st.integers(0, 3 * 2**20))
def test_one_token_more_than_the_largest_context_does_not_fit(name, batch, new, spare):
    plan = make_plan(POLICIES[name], SITES)
    memory = memory_bytes(plan, batch, 1, new) + spare
    length = largest_context(plan, memory, batch, new)
    assert length is not None
    assert allocated(plan, batch, length, new) <= memory < allocated(plan, batch, length + 1, new)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=5)
@given(st.integers(1, 300), st.integers(0, 40), st.integers(0, 2**24))
def test_one_row_more_than_the_largest_batch_does_not_fit(name, context, new, spare):
    plan = make_plan(POLICIES[name], SITES)
    memory = memory_bytes(plan, 1, context, new) + spare
    batch = largest_batch(plan, memory, context, new)
    assert allocated(plan, batch, context, new) <= memory < allocated(plan, batch + 1, context, new)


BUDGETED = {
    "streaming": lambda budget: StreamingLLM(budget=budget),
    "snapkv and crush": lambda budget: SnapKV(budget) | KVCrush(),
    "snapkv in codes": lambda budget: SnapKV(budget) | KIVI(4),
    "layers": lambda budget: LayerBudgets(budget, SHARES) | SnapKV(),
    # up to 3 / 4 a PolicyError: three of the four layers are kept whole
    "inner layers": lambda budget: KVMerger(budget, skip_layers=True),
}


@pytest.mark.parametrize("name", BUDGETED)
@settings(max_examples=5)
@given(st.integers(1, 3), st.integers(400, 700), st.floats(0.77, 0.85))
def test_one_entry_more_than_the_budget_does_not_fit(name, batch, context, share):
    def plan_for(budget: float) -> Plan:
        return make_plan(BUDGETED[name](budget), EQUAL)

    memory = memory_bytes(plan_for(share), batch, context)
    budget = fitting_budget(plan_for, memory, batch, context)
    assert share <= budget < 1.0
    assert allocated(plan_for(budget), batch, context) <= memory
    assert memory < allocated(plan_for(budget + 2**-53), batch, context)


def test_the_whole_budget_is_found():
    plan = make_plan(SnapKV(1.0), SITES)
    memory = memory_bytes(plan, 2, 500)
    assert fitting_budget(lambda budget: make_plan(SnapKV(budget), SITES), memory, 2, 500) == 1.0


@pytest.mark.parametrize(
    ("policy", "sites"),
    [(StreamingLLM(budget=40), SITES), (Full(), SITES[2:3]), (LayerBudgets(60, SHARES), EQUAL)],
    ids=["count", "window", "layer counts"],
)
def test_a_cache_that_stops_growing_takes_any_context(policy, sites):
    plan = make_plan(policy, sites)
    assert largest_context(plan, memory_bytes(plan, 2, 10**12), 2) is None


def test_what_cannot_fit_says_what_the_least_would_need():
    plan = make_plan(Full(), (site(),))
    row, rows = 256 * 2 * 3 * 64 * 4 + 12, 3 * (256 * 2 * 3 * 64 * 4 + 12)
    with pytest.raises(
        CapacityExceeded, match=rf"Full\(\) needs {rows:,} bytes .* for 3 rows of 1"
    ):
        largest_context(plan, rows - 1, batch=3)
    assert largest_context(plan, rows, batch=3) == 256
    with pytest.raises(
        CapacityExceeded, match=rf"needs {row:,} bytes \(384.0 KiB\) for 1 row of 7"
    ):
        largest_batch(plan, "100KiB", 7)
    with pytest.raises(CapacityExceeded, match="for 1 row of 256 tokens and 1 new ones"):
        fitting_budget(lambda _: plan, row, 1, 256, new=1)


def test_a_budget_that_is_refused_is_too_small():
    def plan_for(budget: float) -> Plan:
        return make_plan(KVMerger(budget, skip_layers=True), EQUAL)

    memory = memory_bytes(plan_for(0.76), 1, 400) // 2
    with pytest.raises(CapacityExceeded, match=r"no budget fits into .*3 of 4 layers kept whole"):
        fitting_budget(plan_for, memory, 1, 400)
    # wrong at any budget: said as it is
    with pytest.raises(PolicyError, match="needs a policy that selects"):
        fitting_budget(lambda _: make_plan(CaM(), SITES), 2**30, 1, 400)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [({"batch": 0}, "batch must be"), ({"new": -1}, "new must be"), ({"batch": 1.5}, "batch")],
    ids=repr,
)
def test_counts_that_make_no_sense_are_refused(wrong, reason):
    with pytest.raises(PolicyError, match=reason):
        largest_context(make_plan(Full(), SITES), 2**30, **wrong)
    with pytest.raises(PolicyError, match="context must be an integer of at least 1"):
        largest_batch(make_plan(Full(), SITES), 2**30, 0)
