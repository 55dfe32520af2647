"""Files that were changed, moved or put in the way are never served and never raise out of `get`;
what else is stored survives them.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from kvfx.reuse import segment_file
from kvfx.reuse.fingerprint import Fingerprint
from kvfx.reuse.owner import Owner
from kvfx.reuse.segment import EXACT_PREFIX, Segment
from kvfx.reuse.store import SegmentStore

MODEL = Fingerprint("w", "t", "c", "r", "float16")
TOKENS, OTHERS = (3, 1, 4, 1), (2, 7, 1, 8)


def segment(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, len(tokens), 6, generator=generator).half() for _ in range(2))
    return Segment(tuple(tokens), (k,), (v,), EXACT_PREFIX, "", 0)


def is_equal(found, expected):
    return found is not None and all(
        a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(found.keys + found.values, expected.keys + expected.values, strict=True)
    )


@pytest.fixture
def folder(tmp_path):
    """A folder with two segments; files of the first are attacked."""
    store = SegmentStore(MODEL, folder=tmp_path)
    store.put(segment(OTHERS, 1))
    store.put(segment(TOKENS))
    return tmp_path


def path_of(folder, tokens=TOKENS, salt="", model=MODEL):
    owner = Owner(model.digest, salt)
    return folder / owner.folder / f"{owner.key(tokens, EXACT_PREFIX, '')}.safetensors"


def assert_refused(folder, reason):
    """The attacked file is a recorded miss for every question, and then it can be written again."""
    for ask in (
        lambda store: store.get(TOKENS),
        lambda store: store.find_prefix((*TOKENS, 9)),
        lambda store: store.load(path_of(folder).stem),
    ):
        shutil.copytree(folder, folder / "copy", symlinks=True)
        store = SegmentStore(MODEL, folder=folder / "copy")
        assert ask(store) is None
        assert store.stats.refusals == 1
        assert reason in store.stats.reasons[0]
        assert is_equal(store.get(OTHERS), segment(OTHERS, 1))
        assert [s.tokens for s in store.segments()] == [OTHERS]
        store.put(segment(TOKENS))
        assert is_equal(SegmentStore(MODEL, folder=folder / "copy").get(TOKENS), segment(TOKENS))
        shutil.rmtree(folder / "copy")


def rewritten(data, change):
    """The file with another header; its tensors stay."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def header_end(data):
    return 8 + int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("share", [0, 1, 7, 8, 9, 100, -97, -96, -95, -1])
def test_truncated(folder, share):
    path = path_of(folder)
    path.write_bytes(path.read_bytes()[: share if share >= 0 else share or None])
    assert_refused(folder, "truncated" if share in (0, 1, 7, 8, 9, 100) else "were written")


def test_longer_than_written(folder):
    with path_of(folder).open("ab") as file:
        file.write(bytes(1000))
    assert_refused(folder, "were written")


def test_every_flipped_bit_of_the_payload(folder):
    path = path_of(folder)
    data = path.read_bytes()
    for byte in range(header_end(data), len(data)):
        path.write_bytes(data[:byte] + bytes([data[byte] ^ 1 << byte % 8]) + data[byte + 1 :])
        store = SegmentStore(MODEL, folder=folder)
        assert store.get(TOKENS) is None
        assert "not those that were written" in store.stats.reasons[0]


def test_flipped_bits_of_the_header(folder):
    path, expected = path_of(folder), segment(TOKENS)
    data = path.read_bytes()
    refused = 0
    for byte in range(header_end(data)):
        path.write_bytes(data[:byte] + bytes([data[byte] ^ 1 << byte % 7]) + data[byte + 1 :])
        store = SegmentStore(MODEL, folder=folder)
        found = store.get(TOKENS)
        # white space may become other white space
        assert found is None or (found.tokens == TOKENS and is_equal(found, expected))
        assert store.stats.refusals == (found is None)
        refused += found is None
    assert refused > 0.95 * header_end(data)


def test_a_header_of_other_numbers(folder):
    """Bytes that are read as another dtype, or in another shape, are other numbers."""

    def dtype(header):
        header["key.0"]["dtype"] = "BF16"

    def shape(header):
        header["key.0"]["shape"] = [2, 6, 4]

    def swapped(header):
        header["key.0"], header["value.0"] = header["value.0"], header["key.0"]

    path = path_of(folder)
    data = path.read_bytes()
    for change in (dtype, shape, swapped):
        path.write_bytes(rewritten(data, change))
        assert_refused(folder, "not those that were written")


@pytest.mark.parametrize(
    ("fact", "value"),
    [("tokens", "3 1 4 2"), ("depth", "1"), ("context", "a" * 64), ("nbytes", "1"), ("seal", "é")],
)
def test_a_header_with_another_fact(folder, fact, value):
    path = path_of(folder)
    path.write_bytes(
        rewritten(path.read_bytes(), lambda header: header["__metadata__"].update({fact: value}))
    )
    assert_refused(folder, "the seal does not fit")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"", "cannot be read"),
        (b"{}", "no texts"),
        (b'{"__metadata__": {"kind": 1}}', "no texts"),
        (b'{"__metadata__": {}}', "no segment of this version"),
        (b'{"__metadata__": {"kind": "kvfx segment 0"}}', "no segment of this version"),
        (b"[" * 100_000, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_headers_that_mean_nothing(folder, header, reason):
    path_of(folder).write_bytes(len(header).to_bytes(8, "little") + header)
    assert_refused(folder, reason)


@pytest.mark.parametrize("length", [2**25 + 1, 2**63, 2**64 - 1])
def test_a_header_that_claims_to_be_huge(folder, length):
    path_of(folder).write_bytes(length.to_bytes(8, "little") + bytes(100))
    assert_refused(folder, "are the most")


def test_more_tokens_than_a_header_lists_are_not_written(folder, monkeypatch):
    monkeypatch.setattr(segment_file, "HEADER_LIMIT", 700)
    store = SegmentStore(MODEL, folder=folder)
    store.put(segment(range(1000)))
    assert "more than a file's header may list" in store.stats.reasons[-1]
    assert SegmentStore(MODEL, folder=folder).get(range(1000)) is None


def test_a_huge_file_is_not_read(folder):
    # sparse: it takes no room
    os.truncate(path_of(folder), 2**40)
    store = SegmentStore(MODEL, folder=folder, disk="2TiB")
    assert store.get(TOKENS) is None
    assert "1,099,511,627,776 bytes" in store.stats.reasons[0]


@pytest.mark.parametrize(
    ("model", "salt", "reason"),
    [(replace(MODEL, weights="w2"), "", "another model"), (MODEL, "b", "another tenant")],
)
def test_files_of_others_under_our_names(folder, model, salt, reason):
    SegmentStore(model, folder=folder, salt=salt).put(segment(TOKENS, 2))
    shutil.copy(path_of(folder, salt=salt, model=model), path_of(folder))
    assert_refused(folder, reason)


def test_a_tenant_cannot_forge_the_files_of_another(folder):
    """All but the salt is known: the seal of other tensors cannot be made."""
    victim = SegmentStore(MODEL, folder=folder, salt="secret")
    victim.put(segment(TOKENS))
    path = path_of(folder, salt="secret")
    data = path.read_bytes()
    header = json.loads(data[8 : header_end(data)])
    forged = {name: torch.zeros_like(tensor) for name, tensor in load(data).items()}
    facts = {**header["__metadata__"], "tensors": segment_file._digest(forged)}
    del facts["seal"]
    path.write_bytes(save(forged, {**facts, "seal": Owner(MODEL.digest, "").seal(facts)}))
    store = SegmentStore(MODEL, folder=folder, salt="secret")
    assert store.get(TOKENS) is None
    assert "the seal does not fit" in store.stats.reasons[0]


def test_a_file_under_another_key(folder):
    shutil.copy(path_of(folder, OTHERS), path_of(folder))
    assert_refused(folder, "renamed")
