"""Environments of the peers: made once, remade where other packages are asked for."""

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
    python, stamp = folder / "bin" / "python", folder / STAMP
    wanted = "\n".join(packages)
    if stamp.is_file() and stamp.read_text("utf-8") == wanted:
        return python
    # half an environment, or that of other packages
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        for command in (
            (sys.executable, "-m", "venv", str(folder)),
            (str(python), "-m", "pip", "install", "--disable-pip-version-check", *packages),
        ):
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
            if done.returncode != 0:
                raise InputError(f"{' '.join(packages)} cannot be installed: read {log}")
    stamp.write_text(wanted, "utf-8")
    return python
