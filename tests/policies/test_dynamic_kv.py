"""DynamicKV: layers compete. See test_layer_budgets.py and core/test_budgets.py."""

from __future__ import annotations

from kvfx import DynamicKV


def test_no_layer_gets_more_than_it_may(calibration, sites):
    free = DynamicKV(0.1).resolve(calibration, sites).shares
    bound = DynamicKV(0.1, most=1.2).resolve(calibration, sites).shares
    assert max(bound) <= 1.2 + 1e-6
    assert max(free) > max(bound)
