"""MaskedDense: the same buffers as Full, in whole buckets."""

import torch

from kvfx.geometry import Causal, Site
from kvfx.policies.full import Full
from kvfx.policies.masked_dense import MaskedDense

SITE = Site(0, "layer", 6, 2, 16, 24, 0.25, Causal(), None, torch.float32, torch.device("cpu"))


def test_buffers_are_those_of_full():
    assert MaskedDense().buffers(SITE) == Full().buffers(SITE)


def test_capacity_is_in_buckets_until_entries_are_bounded():
    assert [MaskedDense().capacity(n, bounded=False) for n in (1, 256, 257)] == [256, 256, 512]
    assert [MaskedDense().capacity(n, bounded=True) for n in (1, 256, 257)] == [1, 256, 257]
