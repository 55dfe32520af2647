"""CAKE: spread and moving attention. See test_layer_budgets.py and core/test_budgets.py."""

from __future__ import annotations

import pytest
import torch

from kvfx import CAKE


def test_shares_follow_the_preferences(calibration, sites):
    shares = CAKE(0.25, tau1=2.0, tau2=3.0).resolve(calibration, sites).shares
    preference = calibration.entropy.double() ** 0.5 * calibration.variance.double() ** (1 / 3)
    expected = (preference / preference.mean(1, keepdim=True)).mean(0)
    assert shares == pytest.approx(expected.tolist(), rel=1e-5)
    assert torch.tensor(shares).mean() == pytest.approx(1.0)
