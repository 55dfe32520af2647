"""Measure everything that the pages' tables and pictures show, and write them.

From the root of the repository: python -m examples.benchmarks.reproduce
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from examples.benchmarks.install import packages_in
from examples.benchmarks.pages import DATA, ROOT, sources, write_pages, write_pictures
from examples.benchmarks.stages import FIRST, SCORED, STAGES, TIMED, Stage

# stages that run at the same time, where nothing is timed
TOGETHER = 2

# what the report shows
DRAWN = ("peers/quality.json", "needles.json", "visible.json", "peers/speed.json")


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
    measure_all(asked.only or known, folder, quick=asked.quick)
    draw(folder)
    if asked.docs:
        write_docs(folder)


def measure_all(files: Collection[str], folder: Path, *, quick: bool) -> None:
    """Run the stages of these files; those that time nothing, at the same time."""
    for stages, together in ((FIRST, TOGETHER), (SCORED, TOGETHER), (TIMED, 1)):
        asked = [stage for stage in stages if stage.file in files]
        if quick:
            asked = [stage for stage in asked if stage.quick is not None]
        threads = None if stages is TIMED else 1
        with ThreadPoolExecutor(together) as pool:
            turns = [
                pool.submit(measure, stage, folder, quick=quick, threads=threads) for stage in asked
            ]
            for turn in turns:
                turn.result()


def measure(stage: Stage, folder: Path, *, quick: bool, threads: int | None = None) -> None:
    """Run one stage on so many threads, or on all; what its file holds already is not measured
    again.
    """
    path, log = folder / stage.file, folder / "logs" / f"{Path(stage.file).stem}.txt"
    if path.exists() and (stage.printed or path.suffix != ".json"):
        print(f"{stage.file}: measured")
        return
    for each in (path, log):
        each.parent.mkdir(parents=True, exist_ok=True)
    name, *options = stage.arguments(str(folder), quick=quick)
    program = [sys.executable, "-m", "kvfx"] if name == "kvfx" else [sys.executable]
    here = dict(os.environ)
    if threads is not None:
        here["OMP_NUM_THREADS"] = str(threads)
    if stage.packages:
        here["PYTHONPATH"] = str(packages_in(folder / "packages", stage.packages))
    start = time.perf_counter()
    print(f"{stage.file}: {name} {' '.join(options)}", flush=True)
    with log.open("w") as told:
        done = subprocess.run(
            [*program, *options],
            cwd=ROOT,
            env=here,
            stdout=subprocess.PIPE,
            stderr=told,
            check=False,
        )
    if done.returncode != 0:
        sys.exit(f"error: {stage.file} was not measured: {log} says why")
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
    """Keep the measured files in docs, draw its pictures, and write the tables of its pages."""
    for name in sources():
        if (folder / name).exists():
            (DATA / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, DATA / name)
    write_pictures()
    for page in write_pages():
        print(f"written: {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
