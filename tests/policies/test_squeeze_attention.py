"""SqueezeAttention: what changes little keeps little. See test_layer_budgets.py."""

from __future__ import annotations

import pytest

from kvfx import SqueezeAttention


def test_the_most_similar_layers_pay_for_the_others(calibration, sites):
    shares = SqueezeAttention(0.25, part=0.4).resolve(calibration, sites).shares
    similarity = calibration.similarity.mean(0).tolist()
    weak = [index for index, share in enumerate(shares) if share == pytest.approx(0.4)]
    assert 0 < len(weak) < 5
    others = [index for index in range(5) if index not in weak]
    assert min(similarity[index] for index in weak) > max(similarity[index] for index in others)
    assert sum(shares) == pytest.approx(5.0)
