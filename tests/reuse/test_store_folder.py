"""A folder that is not as a store left it, or cannot be written: nothing is served that was not
stored, and nothing that was stored is lost.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch

from kvfx.errors import StoreError
from kvfx.reuse import files
from kvfx.reuse.files import MARKER, STALE
from kvfx.reuse.fingerprint import Fingerprint
from kvfx.reuse.owner import Owner
from kvfx.reuse.segment import DECODED, EXACT_PREFIX, Segment
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


def test_names_that_lead_elsewhere_are_not_followed(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    treasure = outside / path_of(folder).name
    shutil.move(path_of(folder), treasure)
    path_of(folder).symlink_to(treasure)
    (folder / "link").symlink_to(outside)
    size = treasure.stat().st_size
    store = SegmentStore(MODEL, memory=1, folder=folder, disk=size)
    assert store.get(TOKENS) is None
    assert "symbolic" in store.stats.reasons[0]
    store.put(segment((1, 2, 3, 4)))
    assert store.get((1, 2, 3, 4)) is not None
    assert store.disk_nbytes == size
    store.clear()
    assert treasure.exists()
    SegmentStore(MODEL, folder=folder).put(segment(TOKENS))
    assert not path_of(folder).is_symlink()
    assert treasure.exists()


@pytest.mark.parametrize(
    ("make", "reason"), [(os.mkfifo, "no regular file"), (os.mkdir, "Is a directory")]
)
def test_what_is_no_file_is_not_read(folder, make, reason):
    path_of(folder).unlink()
    make(path_of(folder))
    store = SegmentStore(MODEL, memory=1, folder=folder)
    assert store.get(TOKENS) is None
    assert reason in store.stats.reasons[0]
    assert store.find_prefix(OTHERS) is not None
    store.put(segment(TOKENS))


def test_names_that_mean_nothing_are_left_alone(folder):
    strangers = [path_of(folder).with_name(name) for name in ("a.safetensors", "notes.txt")]
    for path in strangers:
        path.write_text("mine")
    store = SegmentStore(MODEL, folder=folder)
    assert len(store.segments()) == 2
    store.clear()
    assert all(path.read_text() == "mine" for path in strangers)
    assert store.stats.refusals == 0


def test_what_is_put_aside_goes_first(folder):
    size = path_of(folder).stat().st_size
    path_of(folder, OTHERS).touch()
    path_of(folder).write_bytes(bytes(size))
    store = SegmentStore(MODEL, folder=folder, disk=2 * size)
    assert store.get(TOKENS) is None
    assert path_of(folder).with_suffix(".refused").exists()
    assert store.disk_nbytes == 2 * size
    store.put(segment(TOKENS))
    assert not path_of(folder).with_suffix(".refused").exists()
    assert (store.stats.evictions, len(store.segments())) == (0, 2)


def test_a_good_file_that_replaces_a_bad_one_is_not_put_aside(folder, monkeypatch):
    """Another process writes between the reading of a bad file and its renaming."""
    path, good = path_of(folder), path_of(folder).read_bytes()
    path.write_bytes(good[:-1])
    original = files._put_aside

    def late(bad, file):
        new = path.with_name("new")
        new.write_bytes(good)
        os.replace(new, path)
        original(bad, file)

    monkeypatch.setattr(files, "_put_aside", late)
    store = SegmentStore(MODEL, folder=folder)
    assert store.get(TOKENS) is None
    assert is_equal(store.get(TOKENS), segment(TOKENS))


def test_folders_that_belong_to_something_else(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="File exists"):
        SegmentStore(MODEL, folder=tmp_path / "file")
    with pytest.raises(StoreError, match=r"belongs to something else \(it has 'file'\)"):
        SegmentStore(MODEL, folder=tmp_path)
    (tmp_path / MARKER).write_text("kvfx segment 0")
    with pytest.raises(StoreError, match="kvfx segment 0"):
        SegmentStore(MODEL, folder=tmp_path)
    assert (tmp_path / "file").read_text() == "x"
    SegmentStore(MODEL, folder=tmp_path / "deep" / "new").put(segment(TOKENS))
    own = tmp_path / "deep" / "new" / Owner(MODEL.digest, "").folder
    shutil.move(own, tmp_path / "moved")
    own.symlink_to(tmp_path / "moved")
    with pytest.raises(StoreError, match="link"):
        SegmentStore(MODEL, folder=tmp_path / "deep" / "new")


def test_no_permission(folder, monkeypatch):
    """As the kernel answers those who are not root."""

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    store = SegmentStore(MODEL, folder=folder, memory=1)
    for name in ("open", "utime", "replace"):
        monkeypatch.setattr(os, name, denied)
    assert store.get(TOKENS) is None
    assert store.segments() == []
    store.put(segment((1, 2)))
    monkeypatch.undo()
    assert all("Permission denied" in reason for reason in store.stats.reasons)
    # nothing was put aside for it
    assert is_equal(store.get(TOKENS), segment(TOKENS))
    monkeypatch.setattr(os, "scandir", denied)
    assert store.segments() == []
    monkeypatch.setattr(files.Path, "iterdir", denied)
    with pytest.raises(StoreError, match="Permission denied"):
        SegmentStore(MODEL, folder=folder)


def test_a_folder_that_may_only_be_read_still_serves(folder, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(30, "Read-only file system")

    store = SegmentStore(MODEL, folder=folder)
    for name in ("utime", "replace", "unlink"):
        monkeypatch.setattr(os, name, denied)
    assert is_equal(store.get(TOKENS), segment(TOKENS))
    assert store.stats.refusals == 0


def test_a_folder_that_vanishes(folder):
    store = SegmentStore(MODEL, folder=folder, memory=1)
    shutil.rmtree(folder)
    assert store.get(TOKENS) is None
    assert store.segments() == []
    store.put(segment(TOKENS))
    assert store.disk_nbytes == 0
    assert store.stats.refusals == 2


def test_a_full_disk_leaves_the_old_state(folder):
    """The kernel stops the file in the middle."""
    store = SegmentStore(MODEL, folder=folder)
    before = sorted(path for path in folder.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        store.put(segment((1, 2), 5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert store.stats.refusals == 1
    assert "File too large" in store.stats.reasons[0]
    assert sorted(path for path in folder.rglob("*")) == before
    # memory still has it, and the next process the rest
    assert is_equal(store.get((1, 2)), segment((1, 2), 5))
    again = SegmentStore(MODEL, folder=folder)
    assert is_equal(again.get(TOKENS), segment(TOKENS))
    assert again.get((1, 2)) is None
    store.put(segment((1, 2), 5))
    assert is_equal(again.get((1, 2)), segment((1, 2), 5))


def test_a_deeper_segment_on_disk_gives_way(folder):
    deep = replace(segment(TOKENS, 1), provenance=DECODED, depth=2)
    SegmentStore(MODEL, folder=folder).put(deep)
    SegmentStore(MODEL, folder=folder).put(replace(segment(TOKENS, 2), provenance=DECODED, depth=1))
    SegmentStore(MODEL, folder=folder).put(replace(segment(TOKENS, 3), provenance=DECODED, depth=3))
    found = SegmentStore(MODEL, folder=folder).get(TOKENS, provenance=DECODED)
    assert found.depth == 1
    assert is_equal(found, segment(TOKENS, 2))


def test_stale_partial_files_are_cleaned_up_and_others_stay(folder):
    old, new = (path_of(folder).with_name(f"{name}.partial") for name in ("old", "new"))
    for path, age in ((old, STALE + 60), (new, 60)):
        path.write_bytes(bytes(100))
        os.utime(path, (time.time() - age,) * 2)
    store = SegmentStore(MODEL, folder=folder)
    assert (old.exists(), new.exists()) == (False, True)
    assert len(store.segments()) == 2
    # what is being written takes room, and is nobody else's to delete
    small = SegmentStore(MODEL, memory=1, folder=folder, disk=store.disk_nbytes)
    small.put(segment((1, 2, 3, 4)))
    assert new.exists()
    assert small.stats.evictions == 1
