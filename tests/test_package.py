"""The wheel: everything is in it, and it runs from where it was put."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import kvfx
from kvfx.testing.tiny import left_padded, tiny_llama

fast = kvfx.compress(tiny_llama(), kvfx.SnapKV(budget=16, window=4), compile=False)
fast.generate(**left_padded((30, 20)), max_new_tokens=3, do_sample=False)
fast.save_html("page.html")
print(kvfx.__file__)
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The content of the wheel."""
    built = tmp_path_factory.mktemp("built")
    # builds in a copy: what an earlier build left in the repository would get into the wheel
    copy = built / "kvfx"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", built]
    subprocess.run([sys.executable, *build, copy], check=True, stdin=subprocess.DEVNULL)
    (wheel,) = built.glob("*.whl")
    folder = built / "unpacked"
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.mark.slow
def test_all_units_and_data_are_in_it(unpacked):
    tracked = subprocess.run(
        ["git", "ls-files", "kvfx", "passes", "kernels"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    wanted = {
        name if name.startswith("kvfx/") else f"kvfx/{name}"
        for name in tracked
        if Path(name).suffix in (".py", ".typed", ".css", ".js", ".html") and Path(name).suffix
    }
    assert wanted <= {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}


@pytest.mark.slow
def test_it_runs(unpacked, tmp_path):
    """From another folder, with nothing of the repository in the path."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(unpacked / "kvfx/__init__.py")
    assert (tmp_path / "page.html").stat().st_size > 10_000
