"""ZipVL: attention decides how many. See also kernels/test_budgets.py."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx import KIVI, ZipVL
from kvfx.errors import PolicyError
from kvfx.testing.tiny import left_padded


def lengths(model, threshold):
    policy = ZipVL(threshold, window=4, interval=8)
    fast = kvfx.compress(model, policy, compile=False, verify=False)
    past = fast(**left_padded((120, 60)), logits_to_keep=1).past_key_values
    return torch.stack([buffers["length"] for buffers in past.state.buffers]), past


def test_a_higher_threshold_keeps_more(small):
    counts = [lengths(small, threshold)[0] for threshold in (0.5, 0.9, 1.0)]
    assert bool((counts[0] <= counts[1]).all())
    assert bool((counts[0] < counts[2]).any())
    # heads keep the same tokens, rows of the batch and layers their own numbers
    assert bool((counts[0] == counts[0][..., :1]).all())
    assert len(set(counts[0][:, 0, 0].tolist())) > 1


def test_what_is_held_is_what_is_allocated(small):
    counts, past = lengths(small, 0.5)
    for held, buffers in zip(counts, past.state.buffers, strict=True):
        assert buffers["k_cache"].shape[2] == int(held.max()) + 8


def test_it_quantizes_and_goes_on(small):
    policy = ZipVL(0.8, window=4, interval=8) | KIVI(8, residual=0)
    fast = kvfx.compress(small, policy, compile=False, verify=False)
    assert fast.generate(**left_padded((120, 60)), max_new_tokens=30).shape == (2, 150)


def test_the_threshold_is_a_part():
    with pytest.raises(PolicyError, match="above 0, at most 1"):
        ZipVL(0.0)
