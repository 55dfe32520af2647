"""MEDA: a softmax of entropies. See test_layer_budgets.py and core/test_budgets.py."""

from __future__ import annotations

import pytest

from kvfx import MEDA


def test_a_low_temperature_sharpens(calibration, sites):
    warm = MEDA(0.25, temperature=100.0).resolve(calibration, sites).shares
    cold = MEDA(0.25, temperature=0.1).resolve(calibration, sites).shares
    assert warm == pytest.approx([1.0] * 5, abs=0.05)
    assert max(cold) > max(warm)
    entropy = calibration.entropy.mean(0)
    assert cold.index(max(cold)) == int(entropy.argmax())
