"""StreamingLLM as data: its knobs, how much it keeps, where it cannot."""

from __future__ import annotations

import pytest
import torch

from kvfx.errors import PolicyError
from kvfx.geometry import Causal, Rope, Site
from kvfx.policies import Full, StreamingLLM

CPU = torch.device("cpu")


def site(rope: Rope | None) -> Site:
    return Site(0, "s", 4, 2, 16, 16, 0.25, Causal(), rope, torch.float32, CPU)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"sinks": -1}, "sinks must be an integer of at least 0"),
        ({"budget": 0.0}, "a fraction must satisfy 0 < budget <= 1"),
        ({"budget": 1.5}, "a fraction must satisfy 0 < budget <= 1"),
        ({"budget": 0}, "a count of entries must be at least 1"),
        ({"budget": True}, "a budget is a fraction"),
        ({"interval": 0}, "interval must be an integer of at least 1"),
        ({"positions": "rank"}, "positions must be one of 'cache', 'absolute'"),
    ],
    ids=str,
)
def test_a_wrong_knob_is_named(knobs, message):
    (name, value), *_ = knobs.items()
    with pytest.raises(PolicyError, match=rf"StreamingLLM\({name}={value!r}\): .*{message}"):
        StreamingLLM(**knobs)


@pytest.mark.parametrize(
    ("policy", "tokens", "kept"),
    [
        (StreamingLLM(budget=0.25), 100, 25),
        (StreamingLLM(budget=0.25), 101, 26),
        (StreamingLLM(budget=0.25), 8, 5),
        (StreamingLLM(budget=0.25), 3, 3),
        (StreamingLLM(budget=12), 100, 12),
        (StreamingLLM(budget=2), 100, 5),
        (StreamingLLM(sinks=0, budget=0.01), 50, 1),
        (StreamingLLM(budget=1.0), 63, 63),
    ],
    ids=str,
)
def test_kept(policy, tokens, kept):
    assert policy.kept(tokens) == kept


def test_cache_positions_need_a_rope():
    reason = StreamingLLM().constraint(site(None))
    assert reason is not None
    assert "absolute" in reason
    assert StreamingLLM(positions="absolute").constraint(site(None)) is None
    assert StreamingLLM().constraint(site(Rope("half", (1.0, 0.1)))) is None


def test_facts():
    policy = StreamingLLM(sinks=2, budget=64, interval=1, positions="absolute")
    assert eval(repr(policy)) == policy
    assert policy.attributes() == {"sinks": 2}
    assert (policy.role, policy.select, policy.score) == ("select", "select_recent", None)
    assert (policy | Full()).roles() == ("select", "store")
    with pytest.raises(PolicyError, match="both play the role 'select'"):
        policy | StreamingLLM()
