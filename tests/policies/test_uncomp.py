"""UNComp: stages of key entropy. See test_layer_budgets.py and core/test_budgets.py."""

from __future__ import annotations

import pytest

from kvfx import UNComp


def test_layers_of_a_stage_share_alike(calibration, sites):
    assert UNComp(0.25, drop=100.0).resolve(calibration, sites).shares == pytest.approx([1.0] * 5)
    shares = UNComp(0.25, drop=0.0).resolve(calibration, sites).shares
    assert sum(shares) == pytest.approx(5.0)
    assert len(set(shares)) > 1
