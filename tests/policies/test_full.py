"""Full as data: its buffers, its capacity, what it promises."""

from __future__ import annotations

import pytest
import torch

from kvfx.geometry import Causal, Site
from kvfx.policies.full import Full

CPU = torch.device("cpu")


def test_buffers_are_the_model_s_own_rows():
    site = Site(0, "s", 8, 2, 16, 12, 0.25, Causal(), None, torch.bfloat16, CPU)
    found = {
        name: (buffer.sizes(3, 7), buffer.dtype, buffer.counter)
        for name, buffer in Full().buffers(site).items()
    }
    assert found == {
        "k_cache": ((3, 2, 7, 16), torch.bfloat16, False),
        "v_cache": ((3, 2, 7, 12), torch.bfloat16, False),
        "length": ((3, 2), torch.int32, True),
    }


@pytest.mark.parametrize(("entries", "bucket"), [(1, 256), (255, 256), (256, 256), (257, 512)])
def test_capacity(entries, bucket):
    assert Full().capacity(entries, bounded=False) == bucket
    assert Full().capacity(entries, bounded=True) == entries


def test_facts():
    policy = Full()
    assert eval(repr(policy)) == policy
    assert (policy.room, policy.rows, policy.croppable, policy.flushes) == (
        "dense",
        "keep",
        True,
        False,
    )
    assert not any(policy.flush_due(length) for length in range(600))
