"""Environments of the peers, and packages: made once, remade where others are asked for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kvfx.errors import InputError

# written last: which packages the environment was made for
STAMP = "packages.txt"


def python_of(folder: Path, packages: Sequence[str]) -> Path:
    """The Python of an environment in `folder` that has these packages."""
    python = folder / "bin" / "python"
    _made(
        folder,
        packages,
        (sys.executable, "-m", "venv", str(folder)),
        (str(python), "-m", "pip", "install", "--disable-pip-version-check", *packages),
    )
    return python


def packages_in(folder: Path, packages: Sequence[str]) -> Path:
    """The folder, with these packages alone, without what they need: for Python's path."""
    install = ("install", "--disable-pip-version-check", "--no-deps", "--target", str(folder))
    _made(folder, packages, (sys.executable, "-m", "pip", *install, *packages))
    return folder


def _made(folder: Path, packages: Sequence[str], *commands: tuple[str, ...]) -> None:
    stamp, wanted = folder / STAMP, "\n".join(packages)
    if stamp.is_file() and stamp.read_text("utf-8") == wanted:
        return
    # half of it, or with other packages
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        for command in commands:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
            if done.returncode != 0:
                raise InputError(f"{' '.join(packages)} cannot be installed: read {log}")
    stamp.write_text(wanted, "utf-8")
