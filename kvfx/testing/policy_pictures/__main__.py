"""Writes the pictures anew."""

from __future__ import annotations

import sys

from kvfx.testing.policy_pictures.all_pictures import FOLDER, PICTURES


def main(names: list[str]) -> None:
    """Write the pictures named, or all of them."""
    for name in names or PICTURES:
        path = FOLDER / f"{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PICTURES[name](), "utf-8")
        sys.stdout.write(f"{path}: {path.stat().st_size:,} bytes\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
