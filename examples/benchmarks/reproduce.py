"""Measure everything that the pages' tables and pictures show, and write them.

From the root of the repository: python -m examples.benchmarks.reproduce
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from examples.benchmarks.pages import DATA, ROOT, TABLES, write_pages
from examples.benchmarks.stages import STAGES, Stage

# drawn from these, into these pages' folder
DRAWN = ("peers/quality.json", "peers/speed.json", "decode.json")
FIGURES = ROOT / "docs/data/figures"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the folder does not hold yet, then draw; `--docs` writes the pages as well."""
    parser = argparse.ArgumentParser("reproduce", description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder; build/measured, or build/quick")
    parser.add_argument("--quick", action="store_true", help="the same in small, in minutes")
    parser.add_argument("--only", nargs="+", help="some files, as stores.json")
    parser.add_argument("--docs", action="store_true", help="write tables and pictures of docs/")
    asked = parser.parse_args(arguments)
    known = [stage.file for stage in STAGES]
    for name in asked.only or ():
        if name not in known:
            sys.exit(f"error: --only {name}: choose from {', '.join(known)}")
    if asked.docs and asked.quick:
        sys.exit("error: --docs and --quick: pages show whole measurements")
    folder = asked.out or ROOT / ("build/quick" if asked.quick else "build/measured")
    folder.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        if stage.file in (asked.only or known):
            measure(stage, folder, quick=asked.quick)
    draw(folder)
    if asked.docs:
        write_docs(folder)


def measure(stage: Stage, folder: Path, *, quick: bool) -> None:
    """Run one stage; what its file holds already is not measured again."""
    path = folder / stage.file
    if path.exists() and (stage.printed or path.suffix != ".json"):
        print(f"{stage.file}: measured")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    name, *options = stage.arguments(str(folder), quick=quick)
    program = [sys.executable, "-m", "kvfx"] if name == "kvfx" else [sys.executable]
    start = time.perf_counter()
    print(f"{stage.file}: {name} {' '.join(options)}", flush=True)
    done = subprocess.run([*program, *options], cwd=ROOT, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        sys.exit(f"error: {stage.file} was not measured: the command above ended with an error")
    if stage.printed:
        path.write_bytes(done.stdout)
    print(f"{stage.file}: {time.perf_counter() - start:.0f} s", flush=True)


def draw(folder: Path) -> None:
    """The page and the pictures of what was measured so far."""
    found = [folder / name for name in DRAWN if (folder / name).exists()]
    if found:
        # names follow what there is to draw: older pictures must not stay beside them
        shutil.rmtree(folder / "figures", ignore_errors=True)
        page = ("--html", str(folder / "report.html"), "--figures", str(folder / "figures"))
        subprocess.run(
            [sys.executable, "-m", "kvfx", "report", *map(str, found), *page], cwd=ROOT, check=True
        )


def write_docs(folder: Path) -> None:
    """Keep the measured files and pictures in docs, and write the tables of its pages."""
    for name in {file for file, _ in TABLES.values()}:
        if (folder / name).exists():
            (DATA / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, DATA / name)
    drawn = list((folder / "figures").glob("quality_bytes*.svg"))
    if drawn:
        shutil.rmtree(FIGURES, ignore_errors=True)
        FIGURES.mkdir(parents=True)
    for picture in drawn:
        shutil.copyfile(picture, FIGURES / picture.name)
    for page in write_pages():
        print(f"written: {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
