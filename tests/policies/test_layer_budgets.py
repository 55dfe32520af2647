"""Budgets that differ between layers: exact sums on the host and in the cache, for every
allocator.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import kvfx
from kvfx import (
    CAKE,
    H2O,
    KIVI,
    MEDA,
    XKV,
    DBudgetKV,
    DynamicKV,
    Full,
    KeyDiff,
    KVMerger,
    LayerBudgets,
    PrefixKV,
    PyramidKV,
    SnapKV,
    SqueezeAttention,
    UNComp,
    Uniform,
    ZipVL,
)
from kvfx.errors import CalibrationError, PolicyError
from kvfx.testing.tiny import left_padded, tiny_gemma3, tiny_llama

ALLOCATORS = {
    "uniform": Uniform(0.25),
    "pyramid": PyramidKV(0.25, beta=4.0),
    "prefix": PrefixKV(0.25),
    "xkv": XKV(0.25),
    "dynamic": DynamicKV(0.25),
    "cake": CAKE(0.25),
    "squeeze": SqueezeAttention(0.25),
    "uncomp": UNComp(0.25, drop=0.0),
    "meda": MEDA(0.25),
    "explicit": LayerBudgets(0.25, (3.0, 1.0, 0.5, 0.5, 0.0)),
}
SELECTORS = {
    "alone": None,
    "snapkv": SnapKV(window=4, interval=8),
    "keydiff": KeyDiff(interval=8),
    "kvmerger": KVMerger(interval=8),
    "h2o kivi": H2O(interval=8) | KIVI(8, residual=0),
}


def policy(name, selector="alone"):
    return (
        ALLOCATORS[name] if SELECTORS[selector] is None else ALLOCATORS[name] | SELECTORS[selector]
    )


def compressed(small, calibration, chosen):
    return kvfx.compress(small, chosen, calibration=calibration, compile=False, verify=False)


def lengths(past) -> torch.Tensor:
    """Live entries [L, B] of the first head."""
    return torch.stack([buffers["length"][:, 0] for buffers in past.state.buffers])


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("name", ALLOCATORS)
def test_the_sum_is_the_budget(small, calibration, name, selector):
    """In each row of a padded batch, as the host counts and as the cache holds."""
    fast = compressed(small, calibration, policy(name, selector))
    past = fast.new_cache()
    fast(**left_padded((200, 120)), past_key_values=past, logits_to_keep=1)
    held, least = lengths(past), fast.plan.sites[0].select.least()
    for row, tokens in enumerate((200, 120)):
        assert int(held[:, row].sum()) == 5 * max(-(-tokens // 4), least)
        expected = [site.schedule.kept(tokens, tokens) for site in fast.plan.sites]
        assert held[:, row].tolist() == expected
    for step in range(20):
        logits = fast(torch.full((2, 1), 5 + step), past_key_values=past).logits
        assert bool(logits.isfinite().all())
        counted = torch.tensor([past.state.entries[site.schedule] for site in fast.plan.sites])
        assert torch.equal(lengths(past).long(), counted)


@pytest.mark.parametrize("name", [name for name in ALLOCATORS if name not in ("uniform", "uncomp")])
def test_layers_differ(small, calibration, name):
    fast = compressed(small, calibration, policy(name))
    counts = [site.schedule.kept(400, 400) for site in fast.plan.sites]
    assert len(set(counts)) > 1
    assert sum(counts) == 500


@pytest.mark.parametrize("name", ALLOCATORS)
def test_more_budget_never_takes_from_a_layer(small, calibration, name):
    if name in ("pyramid", "xkv", "dynamic", "prefix"):
        pytest.skip("its shares depend on the budget")
    before = [0] * 5
    for tokens in (40, 100, 101, 150, 400, 4000):
        plan = compressed(small, calibration, policy(name)).plan
        counts = [site.schedule.kept(tokens, tokens) for site in plan.sites]
        assert all(count >= old for count, old in zip(counts, before, strict=True))
        before = counts


@pytest.mark.parametrize("name", ALLOCATORS)
def test_the_whole_budget_is_the_dense_cache(small, calibration, name):
    """b = 1: every layer keeps everything, bit for bit."""
    full = compressed(small, None, Full())
    fast = compressed(small, calibration, dataclasses.replace(ALLOCATORS[name], budget=1.0))
    prompt = left_padded((90, 40))
    expected, found = (model(**prompt) for model in (full, fast))
    assert torch.equal(found.logits, expected.logits)
    pairs = (found.past_key_values.state.buffers, expected.past_key_values.state.buffers)
    for few, every in zip(*pairs, strict=True):
        assert torch.equal(few["length"], every["length"])
        assert torch.equal(few["k_cache"][:1, :, :90], every["k_cache"][:1, :, :90])


def test_resolved_budgets_need_no_calibration(small, calibration):
    """What an allocator found is plain numbers, which Python reads again."""
    plan = compressed(small, calibration, PrefixKV(0.25) | SnapKV(window=4)).plan
    again = eval(repr(plan.policy))
    assert again == plan.policy
    assert compressed(small, None, again).plan == plan


def test_windowed_layers_do_not_count():
    model = tiny_gemma3()
    fast = kvfx.compress(model, PyramidKV(0.25) | H2O(), compile=False, verify=False)
    counts = [site.schedule.kept(100, 100) for site in fast.plan.sites if site.select is not None]
    assert counts == [25]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerBudgets(0.25, (1.0, -1.0)), "numbers of at least 0"),
        (lambda: LayerBudgets(0.0, (1.0,)), "0 < budget <= 1"),
        (lambda: PrefixKV(budget=1.5), "0 < budget <= 1"),
        (lambda: PyramidKV(beta=0.5), "beta is at least 1"),
        (lambda: CAKE(tau1=0.0), "both are positive"),
        (lambda: SqueezeAttention(part=2.0), "from 0 to 1"),
        (lambda: MEDA(temperature=0.0), "positive"),
        (lambda: DynamicKV(most=0.5), "at least 1"),
        (lambda: PrefixKV() | PyramidKV(), "both play the role 'allocate'"),
    ],
    ids=["share", "budget", "prefix", "beta", "tau", "part", "temperature", "most", "two"],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(PolicyError, match=message):
        make()


def test_a_calibration_is_asked_for(small):
    with pytest.raises(CalibrationError, match=r"XKV\(budget=0.25\) is decided by measurements"):
        compressed(small, None, XKV())


def test_the_calibration_of_another_model_is_refused(calibration):
    with pytest.raises(CalibrationError, match="calibrate this model"):
        compressed(tiny_llama(layers=5), calibration, PrefixKV())


def test_the_shares_of_another_model_are_refused(small):
    with pytest.raises(PolicyError, match="2 shares for a model of 5 sites"):
        compressed(small, None, LayerBudgets(0.25, (1.0, 1.0)))


@pytest.mark.parametrize("select", [ZipVL(), DBudgetKV()], ids=["zip-vl", "dbudget"])
def test_a_method_that_counts_itself_has_no_budget_to_divide(small, select):
    with pytest.raises(PolicyError, match=r"divides a budget, and .* has none"):
        compressed(small, None, PyramidKV() | select)
    # a sweep over budgets measures it as it is
    assert select.with_budget(0.5) == select
