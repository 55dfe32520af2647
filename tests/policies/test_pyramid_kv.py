"""PyramidKV: budgets fall in equal steps. See test_layer_budgets.py and core/test_budgets.py."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kvfx import LayerBudgets, PyramidKV


@pytest.mark.parametrize("beta", [1.0, 4.0, 20.0])
def test_shares_fall_in_equal_steps(beta, sites):
    found = PyramidKV(0.1, beta=beta).resolve(None, sites)
    assert isinstance(found, LayerBudgets)
    steps = [a - b for a, b in pairwise(found.shares)]
    assert sum(found.shares) == pytest.approx(5.0)
    assert steps == pytest.approx([steps[0]] * 4)
    assert found.shares[0] == pytest.approx(2.0 - 1.0 / beta)


def test_no_layer_keeps_more_than_the_prompt(sites):
    shares = PyramidKV(0.75).resolve(None, sites).shares
    assert 0.75 * shares[0] == pytest.approx(1.0)
