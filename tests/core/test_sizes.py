"""Sizes are read to the byte, and refused with a remedy."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfx.errors import InputError
from kvfx.sizes import SHOWN, UNITS, parse_size, size_text

SIZES = {
    "8GiB": 8 * 2**30,
    "512 MiB": 512 * 2**20,
    "1.5GB": 1_500_000_000,
    " 100 ": 100,
    "100B": 100,
    "1_000 kb": 1_000_000,
    "0.5kib": 512,
    ".5 KiB": 512,
    "2tib": 2 * 2**40,
    # doubles would give 1_100_000_000_000.0001 and 4_349_999.999
    "1.1TB": 1_100_000_000_000,
    "4.35MB": 4_350_000,
    # a fraction of a byte holds nothing
    "1.0009KB": 1000,
}


@pytest.mark.parametrize("text", SIZES)
def test_text_is_bytes(text):
    assert parse_size(text) == SIZES[text]


@pytest.mark.parametrize("count", [1, 63, 2**70])
def test_integers_are_bytes(count):
    assert parse_size(count) == count


@given(st.integers(1, 2**80), st.sampled_from(list(UNITS)))
def test_whole_numbers_are_exact(count, unit):
    assert parse_size(f"{count}{unit}") == count * UNITS[unit]


BAD = {
    "much": "is not a size",
    "": "is not a size",
    "-1GiB": "is not a size",
    "1e9": "is not a size",
    "8 GiB free": "is not a size",
    "1.GiB": "is not a size",
    "8G": "there is no unit 'G'",
    "8 Gib/s": "is not a size",
    "0": "at least one byte",
    "0.5B": "at least one byte",
    "nan": "is not a size",
    0: "at least one byte",
    -5: "at least one byte",
    True: "is not a size",
    0.5: "is not a size",
    None: "is not a size",
}


@pytest.mark.parametrize("size", BAD, ids=repr)
def test_what_is_no_size_is_refused(size):
    with pytest.raises(InputError, match=re.escape(BAD[size])) as caught:
        parse_size(size, "budget")
    assert str(caught.value).startswith(f"budget={size!r}")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        # not "1,024.0 KiB"
        (2**20 - 1, "1.0 MiB"),
        (8 * 2**30, "8.0 GiB"),
        (5000 * 2**40, "5,000.0 TiB"),
    ],
)
def test_bytes_as_text(count, text):
    assert size_text(count) == text


@given(st.integers(1, 2**50))
def test_text_can_be_read_back(count):
    text = size_text(count)
    unit = 1 if text.endswith(" B") else 2 ** (10 * SHOWN.index(text.split()[1]))
    # one decimal is shown
    assert abs(parse_size(text.replace(",", "")) - count) <= 0.05 * unit + 1
