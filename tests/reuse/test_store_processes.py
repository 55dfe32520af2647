"""Processes that share a folder, or are killed while they write, lose and mix up nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from kvfx.reuse.files import STALE

# what all processes know: a segment follows from its number
COMMON = """
import os, sys, time
import torch
from kvfx.reuse.fingerprint import Fingerprint
from kvfx.reuse.segment import ISOLATED, Segment
from kvfx.reuse.store import SegmentStore

def segment(number):
    tokens = tuple(range(number, number + 50))
    parts = torch.arange(3 * 2 * 50 * 8, dtype=torch.float32).add(number).view(3, 2, 50, 8)
    return Segment(tokens, (parts[0], parts[1]), (parts[2], parts[0]), ISOLATED, "", 0)

def opened(folder, disk="1GiB"):
    model = Fingerprint("w", "t", "c", "r", "float32")
    return SegmentStore(model, memory=1, folder=folder, disk=disk)

def is_right(found, number):
    expected = segment(number)
    pairs = zip(found.keys + found.values, expected.keys + expected.values, strict=True)
    return found.tokens == expected.tokens and all(torch.equal(a, b) for a, b in pairs)
"""

# stops for good when half of the file is on the disk
STUCK = """
def half(descriptor):
    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    print("half", flush=True)
    time.sleep(600)

mine = opened(sys.argv[1])
mine.put(segment(1))
mine.put(segment(2))
os.fsync = half
mine.put(segment(3))
"""

# says what is stored when it is
WRITES = """
mine = opened(sys.argv[1])
for number in range(100_000):
    mine.put(segment(number))
    print(number, flush=True)
"""

# writes, reads and evicts: its own segments and those of the others
MIXED = """
print("ready", flush=True)
sys.stdin.readline()
mine = opened(sys.argv[1], sys.argv[2])
step, found = int(sys.argv[3]), 0
for turn in range(60):
    number = turn * step % 13
    mine.put(segment(number))
    for other in (number, (number + 3) % 13):
        answer = mine.find_prefix(segment(other).tokens + (9,))
        assert answer is None or is_right(answer, other)
        found += answer is not None
    if turn % 10 == 0:
        mine.remove(mine.put(segment(step)))
assert found > 30, found
assert mine.stats.refusals == 0, mine.stats
assert mine.stats.evictions > 5, mine.stats
"""


COMMON_NAMES: dict = {}
exec(COMMON, COMMON_NAMES)
segment, opened, is_right = (COMMON_NAMES[name] for name in ("segment", "opened", "is_right"))


def started(program, *arguments):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", COMMON + program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def killed(process):
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL
    return rest


def test_killed_with_half_a_file_written(tmp_path):
    process = started(STUCK, tmp_path)
    assert process.stdout.readline() == "half\n"
    killed(process)
    store = opened(tmp_path)
    assert [is_right(store.get(segment(number).tokens), number) for number in (1, 2)] == [True] * 2
    assert store.get(segment(3).tokens) is None
    assert store.stats.refusals == 0
    (partial,) = tmp_path.rglob("*.partial")
    os.utime(partial, (time.time() - STALE - 60,) * 2)
    again = opened(tmp_path)
    assert not partial.exists()
    again.put(segment(3))
    assert is_right(opened(tmp_path).get(segment(3).tokens), 3)


def test_killed_at_any_moment(tmp_path):
    process = started(WRITES, tmp_path)
    lines = [process.stdout.readline() for _ in range(25)]
    lines += killed(process).splitlines()
    store = opened(tmp_path)
    written = [int(line) for line in lines]
    assert all(is_right(store.get(segment(number).tokens), number) for number in written)
    # the one that was being written may be there too, and is whole
    assert len(store.segments()) - len(written) in (0, 1)
    assert all(store.load(stored.key) is not None for stored in store.segments())
    assert store.stats.refusals == 0


def test_writers_readers_and_evicters_at_once(tmp_path):
    folder = tmp_path / "shared"
    single = opened(tmp_path / "one")
    single.put(segment(1))
    budget = 6 * single.disk_nbytes
    processes = [started(MIXED, folder, budget, step) for step in (1, 1, 5)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    store = opened(folder, budget)
    assert 0 < store.disk_nbytes <= budget
    for stored in store.segments():
        assert is_right(store.load(stored.key), stored.tokens[0])
    assert list(folder.rglob("*.partial")) == []
