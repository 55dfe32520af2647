"""Tables of measurements: each page shows what the measured files say, and every stage runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.benchmarks import reproduce
from examples.benchmarks.pages import BLOCK, DATA, FIGURES, PICTURES, TABLES, filled, pages, sources
from examples.benchmarks.stages import FIRST, STAGES, TIMED
from kvfx.errors import InputError

ROOT = Path(__file__).parents[1]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", pages(), ids=named)
def test_tables_are_what_was_measured(page):
    text = page.read_text("utf-8")
    assert filled(text) == text


def test_every_measured_table_has_a_page():
    shown = [name for page in pages() for name, _ in BLOCK.findall(page.read_text("utf-8"))]
    assert sorted(shown) == sorted(TABLES)
    assert sources() <= {stage.file for stage in STAGES}


def test_every_measured_picture_has_a_page():
    every = (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    shown = [
        name
        for page in every
        for name in re.findall(r"data/figures/([\w-]+)\.svg", page.read_text("utf-8"))
    ]
    assert set(shown) == set(PICTURES) == {path.stem for path in FIGURES.iterdir()}


def test_a_number_that_was_not_measured_is_noticed():
    page = pages()[0].read_text("utf-8")
    block = BLOCK.search(page)
    assert block is not None
    assert filled(page.replace(block[2], "| fast |\n")) != page.replace(block[2], "| fast |\n")
    with pytest.raises(InputError, match="known are"):
        filled("<!-- measured: nonsense -->\n<!-- end of measured -->")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"stores\.json is missing: measure it"):
        filled("<!-- measured: stores -->\n<!-- end of measured -->", tmp_path)


def test_only_names_a_stage(capsys):
    with pytest.raises(SystemExit, match=r"--only tables\.json: choose from calibration"):
        reproduce.main(["--only", "tables.json"])
    with pytest.raises(SystemExit, match="pages show whole measurements"):
        reproduce.main(["--quick", "--docs"])


def test_a_stage_that_fails_ends_the_run(tmp_path, monkeypatch):
    (stage,) = (stage for stage in STAGES if stage.file == "stores.json")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SystemExit, match=r"stores\.json was not measured"):
        reproduce.measure(stage, tmp_path, quick=True)


def test_what_is_timed_runs_alone(tmp_path, monkeypatch):
    """Scores two at a time, each on one thread; before them what they read, behind them times, one
    after the other.
    """
    running, seen = [], []

    def measure(stage, folder, *, quick, threads):
        running.append(stage)
        time.sleep(0.02)
        seen.append((stage, tuple(running), threads))
        running.remove(stage)

    monkeypatch.setattr(reproduce, "measure", measure)
    reproduce.measure_all([stage.file for stage in STAGES], tmp_path, quick=False)
    order = [stage for stage, _, _ in seen]
    assert set(order[: len(FIRST)]) == set(FIRST)
    assert order[-len(TIMED) :] == list(TIMED)
    assert max(len(beside) for _, beside, _ in seen) == reproduce.TOGETHER
    for stage, beside, threads in seen:
        assert threads == (None if stage in TIMED else 1)
        assert stage not in TIMED or beside == (stage,)


def test_the_quick_profile_leaves_out_what_needs_other_packages(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(reproduce, "measure", lambda stage, *_, **__: seen.append(stage))
    reproduce.measure_all([stage.file for stage in STAGES], tmp_path, quick=True)
    assert set(seen) == {stage for stage in STAGES if not stage.packages}


def test_what_is_measured_is_kept(tmp_path, capsys, monkeypatch):
    stage = next(stage for stage in STAGES if stage.printed)
    (tmp_path / stage.file).write_text("{}")
    monkeypatch.setattr(subprocess, "run", None)
    reproduce.measure(stage, tmp_path, quick=True)
    assert "measured" in capsys.readouterr().out


def test_measured_files_say_where_and_when():
    for name in sources():
        text = (DATA / name).read_text("utf-8")
        document = json.loads(text)
        rows = document.get("measurements", [document])
        assert all(row["versions"] and row["device"] and row["threads"] for row in rows)


@pytest.mark.slow
def test_everything_is_measured_in_short(tmp_path, smollm2):
    """The quick profile: each stage's command runs and leaves its file, then all is drawn."""
    del smollm2  # it is converted before, and kept where the commands look for it
    done = subprocess.run(
        [sys.executable, "-m", "examples.benchmarks.reproduce", "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        # workers of a parallel test run share the cores
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in STAGES:
        if stage.quick is not None:
            assert (tmp_path / stage.file).stat().st_size > 0
    assert (tmp_path / "report.html").exists()
    assert list((tmp_path / "figures").glob("quality_bytes*.svg"))
