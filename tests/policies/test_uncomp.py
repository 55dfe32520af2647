"""UNComp: stages of key entropy. See test_layer_budgets.py and core/test_budgets.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvfx import UNComp


def test_layers_of_a_stage_share_alike(calibration, sites):
    assert UNComp(0.25, drop=100.0).resolve(calibration, sites).shares == pytest.approx([1.0] * 5)
    falling = torch.tensor([[3.0, 3.5, 1.0, 1.5, 0.5]] * 2)
    measured = dataclasses.replace(calibration, key_entropy=falling)
    shares = UNComp(0.25, drop=1.0).resolve(measured, sites).shares
    # the fall by 1 exactly is no end of a stage
    expected = [3.25 * 5 / 9.5, 3.25 * 5 / 9.5, 5 / 9.5, 5 / 9.5, 5 / 9.5]
    assert shares == pytest.approx(expected)
