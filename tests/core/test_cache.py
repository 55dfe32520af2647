"""Buffers as expressions: their shapes, their bytes, how they grow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfx.cache import BATCH, BUCKET, CAPACITY, Buffer, in_buckets

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("entries", "expected"), [(0, 256), (1, 256), (255, 256), (256, 256), (257, 512), (4096, 4096)]
)
def test_the_next_bucket(entries, expected):
    assert BUCKET == 256
    assert in_buckets(entries) == expected


@given(
    st.integers(1, 5),
    st.integers(1, 70),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int32, torch.int16]),
)
def test_bytes_are_what_is_allocated(batch, tiles, dtype):
    buffer = Buffer((BATCH, 3, CAPACITY / 32, 7), dtype)
    tensor = buffer.allocate(batch, 32 * tiles, CPU)
    assert tensor.shape == (batch, 3, tiles, 7)
    assert tensor.dtype == dtype
    expected = buffer.bytes().subs({BATCH: batch, CAPACITY: 32 * tiles})
    assert tensor.untyped_storage().nbytes() == expected


def test_an_empty_buffer_is_filled():
    buffer = Buffer((BATCH, CAPACITY), torch.int32, fill=-1)
    assert (buffer.allocate(2, 5, CPU) == -1).all()


@pytest.mark.parametrize("capacity", [1, 6, 7, 8, 63])
def test_entries_stay_when_a_buffer_is_resized(capacity):
    buffer = Buffer((BATCH, 2, CAPACITY, 3), torch.float32, fill=-1)
    old = torch.randn(buffer.sizes(4, 7))
    new = buffer.resize(old, 4, capacity)
    shared = min(capacity, 7)
    assert new.shape == (4, 2, capacity, 3)
    assert torch.equal(new[:, :, :shared], old[:, :, :shared])
    assert (new[:, :, shared:] == -1).all()


def test_what_has_the_size_already_is_not_copied():
    counter = Buffer((BATCH, 2), torch.int32, counter=True)
    old = torch.arange(6, dtype=torch.int32).reshape(3, 2)
    assert counter.resize(old, 3, 999) is old
