"""Policies as text: what is read, and what is refused with a hint."""

from __future__ import annotations

import pytest

import kvfx
from kvfx.errors import PolicyError
from kvfx.policies import KIVI, METHODS, PRESETS, Full, PerLayer, StreamingLLM, policy_named


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("KIVI(bits=4)", KIVI(bits=4)),
        ("KIVI(4)", KIVI(bits=4)),
        (" kvfx.KIVI(bits=2) ", KIVI(bits=2)),
        ("StreamingLLM(budget=0.25) | KIVI(bits=4)", StreamingLLM(budget=0.25) | KIVI(bits=4)),
        ("KIVI(k_bits=None, mode='kivi')", KIVI(mode="kivi")),
        (
            "PerLayer(default=KIVI(bits=2), layers={0: Full(), -1: Full()})",
            PerLayer(default=KIVI(bits=2), layers={0: Full(), -1: Full()}),
        ),
    ],
    ids=str,
)
def test_expressions(text, policy):
    assert policy_named(text) == policy


@pytest.mark.parametrize("name", PRESETS)
def test_presets_and_their_repr(name):
    assert policy_named(name) is PRESETS[name]
    assert policy_named(repr(PRESETS[name])) == PRESETS[name]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("kivi-4bits", "did you mean 'kivi-4bit'"),
        ("KIVY(bits=4)", "no method 'KIVY': did you mean KIVI"),
        ("KIVI", r"write KIVI\(\)"),
        ("KIVI(bit=4)", "KIVI has no field 'bit': did you mean bits"),
        ("KIVI(bits=3)", "bits must be one of 2, 4, 8"),
        ("KIVI(bits=4", "not an expression"),
        ("KIVI(*[4])", "neither a literal"),
        ("KIVI(**{'bits': 4})", "has no field"),
        ("KIVI(bits=2 + 2)", "'2 \\+ 2' is neither a literal"),
        ("KIVI(bits=open('x'))", "no method 'open'"),
        ("KIVI(1, 2, 3, 4, 5, 6, 7, 8)", "positional arguments"),
        ("KIVI(4, bits=4)", "multiple values"),
        ("KIVI(bits=4) | 3", "neither a literal"),
        ("KIVI(bits=4) | KIVI(bits=2)", "both play the role 'store'"),
        ("KIVI(bits=-4)", "bits must be one of"),
        ("__import__('os').system('true')", "no method"),
        ("(lambda: 0)()", "no method"),
        ("(4)", "is a int, not a policy"),
        ("Composition()", "no method 'Composition'"),
    ],
)
def test_refusals(text, reason):
    with pytest.raises(PolicyError, match=reason):
        policy_named(text)


def test_every_method_is_known():
    for method in METHODS:
        with pytest.raises(PolicyError, match=rf"write {method.__name__}\(\)"):
            policy_named(method.__name__)


def test_explain_reads_expressions():
    from kvfx.testing.tiny import tiny_llama

    report = kvfx.explain(tiny_llama(layers=1), "StreamingLLM(budget=0.5)")
    assert report.policy == "StreamingLLM(budget=0.5)"


def test_full_is_itself():
    assert policy_named("Full()") == Full()
