"""Policies as data: how they compose, what they refuse, and what budgets mean."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvfx
from kvfx import KIVI, Full, PerLayer, StreamingLLM
from kvfx.errors import KvfxError, PolicyError
from kvfx.policies import METHODS, PRESETS, policy_named
from kvfx.policy import ROLES

POLICIES = [
    Full(),
    KIVI(bits=4),
    StreamingLLM(budget=7, interval=1),
    StreamingLLM() | KIVI(k_bits=8, v_bits=4),
    PerLayer(KIVI(), {0: Full(), -1: StreamingLLM() | KIVI(8)}),
]


@pytest.mark.parametrize("policy", [*POLICIES, *PRESETS.values()], ids=repr)
def test_repr_is_python_and_equality_is_by_value(policy):
    again = eval(repr(policy), {method.__name__: method for method in METHODS})
    assert again == policy
    assert hash(again) == hash(policy)


def test_a_policy_does_not_change():
    with pytest.raises(FrozenInstanceError):
        KIVI().bits = 4


def test_roles_compose_in_any_order():
    both = StreamingLLM() | KIVI(4)
    assert both.parts() == (StreamingLLM(), KIVI(4))
    assert both.roles() == ("select", "store")
    assert (KIVI(4) | StreamingLLM()).parts() == (KIVI(4), StreamingLLM())
    assert {role for method in (Full, KIVI, StreamingLLM) for role in method().roles()} <= set(
        ROLES
    )


@pytest.mark.parametrize(
    ("first", "second", "role"),
    [
        (KIVI(2), KIVI(4), "store"),
        (Full(), KIVI(4), "store"),
        (StreamingLLM(), StreamingLLM(budget=0.5), "select"),
        (StreamingLLM() | KIVI(2), Full(), "store"),
        (PerLayer(KIVI(2)), KIVI(4), "store"),
    ],
    ids=repr,
)
def test_one_role_twice_names_both(first, second, role):
    with pytest.raises(PolicyError) as caught:
        first | second
    message = str(caught.value)
    assert repr(second) in message
    assert any(repr(part) in message for part in first.parts())
    assert f"the role {role!r}: keep one of them" in message


@pytest.mark.parametrize(
    ("budget", "rule"),
    [
        (0.0, "0 < budget <= 1"),
        (1.5, "0 < budget <= 1; give an int for a count of entries"),
        (-0.1, "0 < budget <= 1"),
        (float("nan"), "0 < budget <= 1"),
        (0, "at least 1"),
        (-4, "at least 1"),
        (True, "a fraction in (0, 1], a count of entries, or bytes"),
        ("25%", "a fraction in (0, 1], a count of entries, or bytes"),
    ],
)
def test_a_budget_out_of_range_names_the_rule(budget, rule):
    with pytest.raises(PolicyError) as caught:
        StreamingLLM(budget=budget)
    assert str(caught.value).startswith(f"StreamingLLM(budget={budget!r}): ")
    assert rule in str(caught.value)


def test_a_policy_error_is_a_value_error():
    with pytest.raises(ValueError, match="sinks must be an integer of at least 0"):
        StreamingLLM(sinks=-1)
    assert issubclass(PolicyError, KvfxError)


@given(st.integers(1, 5000), st.floats(0.001, 1.0))
def test_a_fraction_is_rounded_up(tokens, budget):
    kept = StreamingLLM(budget=budget).kept(tokens)
    assert kept == min(tokens, max(math.ceil(budget * tokens), 5))


@pytest.mark.parametrize(("tokens", "kept"), [(3, 3), (7, 7), (8, 7), (1000, 7)])
def test_a_count_is_taken_as_it_is(tokens, kept):
    assert StreamingLLM(budget=7).kept(tokens) == kept


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_found(name):
    assert policy_named(name) == PRESETS[name]


@pytest.mark.parametrize(
    ("name", "near"), [("kivi-2bits", "kivi-2bit"), ("kivi2bit", "kivi-2bit"), ("fulll", "full")]
)
def test_an_unknown_name_names_the_nearest(name, near):
    with pytest.raises(PolicyError) as caught:
        kvfx.policy_named(name)
    assert str(caught.value).startswith(f"there is no policy {name!r}: did you mean ")
    assert repr(near) in str(caught.value)


def test_a_name_like_no_other_lists_them_all():
    with pytest.raises(PolicyError) as caught:
        policy_named("zzz")
    assert all(name in str(caught.value) for name in PRESETS)
