"""FlatDense: one buffer per row for all heads. See test_ada_kv.py and kernels/test_flat.py."""

from __future__ import annotations

import torch

from kvfx.geometry import Causal, Site
from kvfx.policies import Full
from kvfx.policies.flat_dense import FlatDense

SITE = Site(0, "s", 4, 2, 16, 8, 0.25, Causal(), None, torch.float32, torch.device("cpu"))


def test_its_entries_take_the_bytes_of_dense_ones():
    names = {"k_cache": "k_flat", "v_cache": "v_flat"}
    dense, flat = Full().buffers(SITE), FlatDense().buffers(SITE)
    for name, other in names.items():
        assert dense[name].bytes() == flat[other].bytes()
        assert flat[other].sizes(3, 10)[1] == 2 * 10
    assert FlatDense().number(SITE, torch.float32).sizes(3, 10) == (3, 20)


def test_it_cannot_be_cropped():
    assert not FlatDense().croppable
