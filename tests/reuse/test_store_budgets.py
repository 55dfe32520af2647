"""Both tiers stay within their budgets, and drop what was used least recently."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfx.reuse.fingerprint import Fingerprint
from kvfx.reuse.segment import EXACT_PREFIX, Segment
from kvfx.reuse.store import SegmentStore

MODEL = Fingerprint("w", "t", "c", "r", "float32")
# bytes of tensors of a segment of four tokens
SIZE = 2 * 4 * (3 + 5) * 4


def segment(tokens):
    k, v = torch.randn(2, len(tokens), 3), torch.randn(2, len(tokens), 5)
    return Segment(tuple(tokens), (k,), (v,), EXACT_PREFIX, "", 0)


def four(first):
    """Four tokens, other ones for every `first`."""
    return tuple(range(10 * first, 10 * first + 4))


def test_memory_drops_what_was_used_least_recently():
    store = SegmentStore(MODEL, memory=3 * SIZE + 1)
    keys = [store.put(segment(four(i))) for i in range(3)]
    store.get(four(0))
    store.find_prefix((*four(1), 9))
    store.put(segment(four(3)))
    assert store.load(keys[2]) is None
    store.put(segment(four(1)))
    store.put(segment(four(4)))
    assert [stored.tokens for stored in store.segments()] == [four(3), four(1), four(4)]
    assert (store.nbytes, store.stats.evictions) == (3 * SIZE, 2)


def test_disk_drops_what_was_used_least_recently(tmp_path):
    size = file_size(tmp_path / "one")
    store = SegmentStore(MODEL, memory=1, folder=tmp_path / "many", disk=3 * size)
    for i in range(3):
        store.put(segment(four(i)))
    store.get(four(0))
    # another process, for which what is in memory counts as used too
    second = SegmentStore(MODEL, folder=tmp_path / "many", disk=3 * size)
    for _ in range(2):
        second.find_prefix((*four(1), 9))
    second.put(segment(four(3)))
    assert {s.tokens for s in store.segments()} == {four(0), four(1), four(3)}
    second.get(four(0))
    second.get(four(1))
    store.put(segment(four(4)))
    assert {s.tokens for s in store.segments()} == {four(0), four(1), four(4)}
    assert (store.stats.evictions, second.stats.evictions) == (1, 1)


def file_size(folder):
    store = SegmentStore(MODEL, folder=folder)
    store.put(segment(four(1)))
    return store.disk_nbytes


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), min_size=1, max_size=30))
def test_budgets_are_never_exceeded(puts):
    memory, disk = 5 * SIZE, 5000
    with TemporaryDirectory() as folder:
        store = SegmentStore(MODEL, memory=memory, folder=folder, disk=disk)
        for first, length in puts:
            store.put(segment(range(100 * first, 100 * first + length)))
            store.get(four(10))
            held = list(store._memory.values())
            assert store.nbytes == sum(s.nbytes for s in held) <= memory
            files = [p for p in Path(folder).rglob("*") if p.is_file() and len(p.name) > 64]
            assert store.disk_nbytes == sum(map(os.path.getsize, files)) <= disk
        assert store.stats.refusals == 0


def test_what_fits_nowhere_is_refused_and_costs_nothing(tmp_path):
    store = SegmentStore(MODEL, memory=SIZE)
    store.put(segment(four(1)))
    store.put(segment(range(100)))
    assert store.stats.refusals == 1
    assert "do not fit into memory=256" in store.stats.reasons[0]
    assert store.get(four(1)) is not None
    size = file_size(tmp_path / "one")
    small = SegmentStore(MODEL, memory=1, folder=tmp_path / "one", disk=size)
    small.put(segment(range(100)))
    assert f"do not fit into disk={size:,}" in small.stats.reasons[0]
    assert small.get(four(1)) is not None
    assert small.stats.evictions == 0
