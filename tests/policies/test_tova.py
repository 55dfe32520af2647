"""TOVA: one set of tokens per layer, chosen by the newest row. See test_eviction.py."""

from __future__ import annotations

import torch

import kvfx
from kvfx import TOVA
from kvfx.testing.tiny import left_padded, tiny_llama


def test_all_heads_keep_the_same_tokens():
    policy = TOVA(budget=7, interval=3)
    fast = kvfx.compress(tiny_llama(), policy | kvfx.Full(), compile=False, verify=False)
    full = kvfx.compress(tiny_llama(), kvfx.Full(), compile=False, verify=False)
    prompt = left_padded((30,))
    found, every = (
        each(**prompt, logits_to_keep=1).past_key_values.state.buffers for each in (fast, full)
    )
    for few, all_ in zip(found, every, strict=True):
        tokens = [
            [
                int((all_["k_cache"][0, head] == key).all(-1).nonzero()[0])
                for key in few["k_cache"][0, head, :7]
            ]
            for head in range(2)
        ]
        assert tokens[0] == tokens[1] == sorted(tokens[0])
        assert tokens[0][-1] == 29


def test_only_the_last_row_counts():
    assert TOVA().decay == 0.0
    assert TOVA().shared
    site = type("Site", (), {"scale": 0.5})()
    assert TOVA().score_attributes(site) == {"scale": 0.5, "window": 1}
    assert torch.tensor(TOVA().kept(100)).item() == 25
