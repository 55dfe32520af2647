"""KVTuner: bits where errors are large. See also core/test_budgets.py."""

from __future__ import annotations

import pytest

import kvfx
from kvfx import H2O, KIVI, Full, KVTuner, PerLayer
from kvfx.errors import CalibrationError, PolicyError
from kvfx.testing.tiny import left_padded


def pairs(policy, sites) -> list[tuple[int, int]]:
    stores = [policy.for_site(site, len(sites)) for site in sites]
    return [(16, 16) if store == Full() else (store.key_bits, store.value_bits) for store in stores]


@pytest.mark.parametrize("bits", [2.0, 3.25, 4.0, 6.5, 8.0])
def test_the_mean_is_kept(calibration, sites, bits):
    found = pairs(KVTuner(bits).resolve(calibration, sites), sites)
    assert sum(map(sum, found)) / 10 <= bits
    if bits in (2.0, 8.0):
        assert found == [(int(bits), int(bits))] * 5


def test_exact_layers_count(calibration, sites):
    policy = KVTuner(8.5, exact=(0, -1))
    found = pairs(policy.resolve(calibration, sites), sites)
    assert found[0] == found[-1] == (16, 16)
    assert sum(map(sum, found)) / 10 <= 8.5


def test_it_composes_and_runs(small, calibration):
    policy = H2O(0.5, interval=8) | KVTuner(3.25, residual=0)
    fast = kvfx.compress(small, policy, calibration=calibration, compile=False, verify=False)
    assert any(isinstance(part, (PerLayer, KIVI)) for part in fast.plan.policy.parts())
    assert fast.generate(**left_padded((90, 40)), max_new_tokens=20).shape == (2, 110)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"bits": 1.0}, "the pairs have 2.0 bits or more"),
        ({"pairs": ((3, 4),)}, "pairs of 2, 4 or 8 bits"),
        ({"power": 0}, "at least 1"),
    ],
    ids=str,
)
def test_a_wrong_knob_is_named(knobs, message):
    with pytest.raises(PolicyError, match=message):
        KVTuner(**knobs)


def test_it_reads_a_calibration(small):
    with pytest.raises(CalibrationError, match="decided by measurements"):
        kvfx.compress(small, KVTuner(), compile=False, verify=False)
