"""XKV: the gain decides. See test_layer_budgets.py and core/test_budgets.py."""

from __future__ import annotations

import torch

from kvfx import XKV


def test_nothing_retains_more(calibration, sites):
    """No move of one step between two layers retains more of the mean curves."""
    curves = calibration.retention.mean(0)
    shares = torch.tensor(XKV(0.25).resolve(calibration, sites).shares)
    steps = (shares / shares.sum() * 5 * 0.25 * 128).round().long()

    def gain(layer, step):
        before = curves[layer, step - 1] if step > 0 else 0.0
        return float(curves[layer, step] - before)

    gains = [gain(layer, int(step)) for layer, step in enumerate(steps)]
    losses = [gain(layer, int(step) - 1) for layer, step in enumerate(steps) if step > 0]
    # counts are rounded to steps here
    assert max(gains) <= 1.2 * min(losses)
