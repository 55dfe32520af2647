"""H2O: column sums rank, and a share of the budget is the newest tokens'. See test_eviction.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kvfx.kernels.scores.reference import columns
from kvfx.kernels.select.reference import select_top
from kvfx.policies import H2O


@pytest.mark.parametrize(("budget", "newest"), [(8, 4), (5, 2), (1, 0)], ids=str)
def test_half_of_the_budget_is_recent(budget, newest):
    score = torch.arange(20.0).flip(0).expand(1, 2, 20)
    live = torch.ones(1, 2, 20, dtype=torch.bool)
    keep = select_top(score, live, torch.full((1, 2), budget), **H2O(budget=budget).attributes())
    kept = keep[0, 0].nonzero()[:, 0].tolist()
    assert kept == [*range(budget - newest), *range(20 - newest, 20)]


def test_early_tokens_are_seen_by_more_rows():
    """Equal keys get equal weights: column t sums 1 / (rows up to r) over rows r from t on."""
    score = columns(torch.zeros(1, 2, 5, 4), torch.zeros(1, 1, 5, 4), live(5), scale=1.0)
    expected = [2 * sum(1 / (row + 1) for row in range(at, 5)) for at in range(5)]
    assert score[0, 0].tolist() == pytest.approx(expected)


def live(rows: int) -> torch.Tensor:
    return torch.ones(1, 1, rows, dtype=torch.bool)


def test_column_sums_of_a_long_prompt_need_no_square():
    """The peak of the whole process: 8,192 x 8,192 weights of 4 heads would be 1 GiB."""
    code = """
import resource, torch
from kvfx.kernels.scores.reference import columns
q, k = torch.randn(1, 4, 8192, 16), torch.randn(1, 1, 8192, 16)
live = torch.ones(1, 1, 8192, dtype=torch.bool)
columns(q[:, :, :128], k[:, :, :128], live[:, :, :128], scale=0.25)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
columns(q, k, live, scale=0.25)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert int(done.stdout) < 200 * 1024
