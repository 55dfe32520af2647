"""ChunkKV: whole chunks, the same in all heads. See test_matrix.py and kernels/test_select.py."""

from __future__ import annotations

import pytest
import torch

import kvfx
from kvfx import ChunkKV, Full
from kvfx.errors import PolicyError
from kvfx.kernels.select.reference import select_chunks
from kvfx.testing.tiny import left_padded, tiny_llama


def test_whole_chunks_stay_in_all_heads():
    llama, policy = tiny_llama(), ChunkKV(budget=20, chunk=4, window=5)
    fast, dense = (kvfx.compress(llama, p, compile=False, verify=False) for p in (policy, Full()))
    # 5 rows of the window and one behind the ninth chunk of 42, three chunks
    tail, tokens = 6, 42
    held = fast(**left_padded((tokens,))).past_key_values.state.buffers
    every = dense(**left_padded((tokens,))).past_key_values.state.buffers
    for found, whole in zip(held, every, strict=True):
        kept = []
        for head in range(2):
            count = int(found["length"][0, head])
            keys = found["k_cache"][0, head, :count]
            same = (keys[:, None] == whole["k_cache"][0, head, None, :tokens]).all(-1)
            kept.append(same.int().argmax(1).tolist())
        assert kept[0] == kept[1]
        chunks = [index for index in kept[0] if index < tokens - tail]
        assert len(chunks) == 12
        assert all(set(range(at // 4 * 4, at // 4 * 4 + 4)) <= set(chunks) for at in chunks)


@pytest.mark.parametrize("rows", range(1, 70, 3))
@pytest.mark.parametrize(("budget", "chunk", "window"), [(20, 4, 5), (30, 7, 3), (12, 1, 4)])
def test_the_host_counts_what_the_op_keeps(rows, budget, chunk, window):
    policy = ChunkKV(budget=budget, chunk=chunk, window=window)
    score, live = torch.rand(1, 2, rows), torch.ones(1, 2, rows, dtype=torch.bool)
    count = torch.full((1, 2), policy.allowed(rows))
    kept = select_chunks(score, live, count, **policy.attributes()).sum(-1)
    assert kept.tolist() == [[policy.kept(rows)] * 2]


@pytest.mark.parametrize("knobs", [{"chunk": 0}, {"window": 0}, {"interval": 0}], ids=str)
def test_a_wrong_knob_is_named(knobs):
    (name, _), *_ = knobs.items()
    with pytest.raises(PolicyError, match=f"{name} must be an integer of at least 1"):
        ChunkKV(**knobs)
