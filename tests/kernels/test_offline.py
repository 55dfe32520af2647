"""Machine code for GPUs that are not here: nothing spills, caches are read 16 bytes at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import triton

from kvfx.testing.offline import TARGETS
from kvfx.testing.shipped.__main__ import ROOMS, table

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/kernels.md"
NVIDIA = ("sm_80", "sm_90")
# (variant, instructions per KV element at most): the budgets of 4 and 2 bits on sm_90
BUDGETS = {
    "attend 4 bit G=128 D=128": 2.5,
    "attend 2 bit G=128 D=128": 2.5,
    "attend 4 bit G=128 D=128, no asm": 4.2,
    "attend 2 bit G=128 D=128, no asm": 4.2,
}
# compiled for its instructions alone: NVIDIA's GPUs get the assembly
UNSHIPPED = ", no asm"

pytestmark = pytest.mark.slow


@cache
def rows(room: str) -> list[dict]:
    """What a room needs; kernels that are interpreted here have to be compiled elsewhere."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "kvfx.testing.shipped", "--json", room]
    out = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(out.stdout)


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_spills(room):
    assert rows(room)
    for row in rows(room):
        for arch in TARGETS:
            if arch in NVIDIA and row["variant"].endswith(UNSHIPPED):
                continue
            assert (row[arch]["stack"], row[arch]["spills"]) == (0, 0), (row["variant"], arch)


@pytest.mark.parametrize("room", ["dense", "kivi"])
def test_caches_are_copied_16_bytes_at_a_time(room):
    # loops over tiles; what is read token by token is no loop to count
    found = [row for row in rows(room) if row["sm_90"]["per_element"] is not None]
    assert found
    for row in found:
        for arch in NVIDIA:
            assert row[arch]["copies"] > 0, (row["variant"], arch)


@pytest.mark.parametrize("variant", BUDGETS)
def test_instructions_per_element(variant):
    found = [row for row in rows("kivi") if row["variant"] == variant]
    each = [row["sm_90"]["per_element"] for row in found]
    assert any(x is not None for x in each)
    assert min(x for x in each if x is not None) <= BUDGETS[variant]


def test_the_documents_table_is_the_one_that_was_compiled():
    text = DOCUMENT.read_text()
    version, rest = text.split("<!-- kernels: triton ")[1].split(" -->", 1)
    if triton.__version__ != version:
        pytest.skip(f"the table is of triton {version}, this is {triton.__version__}")
    written = rest.split("<!-- end -->")[0].strip().splitlines()
    compiled = table([row for room in ROOMS for row in rows(room)])
    assert written == compiled, "run: TRITON_INTERPRET=0 python -m kvfx.testing.shipped"
