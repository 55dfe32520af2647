"""Sizes in bytes as people write them: `8GiB`, `512 MiB`, `1.5GB`."""

from __future__ import annotations

import re
from fractions import Fraction

from kvfx.errors import InputError

UNITS: dict[str, int] = {
    "B": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
SHOWN = ("B", "KiB", "MiB", "GiB", "TiB")
EXAMPLE = "write a number of bytes, or '8GiB', '512 MiB', '1.5GB'"


def parse_size(size: int | str, what: str = "memory") -> int:
    """The bytes that `size` spells: an int, or a number and a unit, rounded down to whole bytes.

    Raises InputError, which says what was sized, for everything else and for less than one byte.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise InputError(f"{what}={size!r} is not a size: {EXAMPLE}")
    count = size if isinstance(size, int) else _bytes(size, what)
    if count < 1:
        raise InputError(f"{what}={size!r}: a size must be at least one byte")
    return count


def size_text(count: float) -> str:
    """Bytes in the largest binary unit of which there is at least one: `1.5 GiB`, `100 B`."""
    power = 0
    # what would be rounded to 1024.0 is one of the next unit
    while power + 1 < len(SHOWN) and round(abs(count) / 2 ** (10 * power), 1) >= 1024:
        power += 1
    if power == 0:
        return f"{count:,.0f} B"
    return f"{count / 2 ** (10 * power):,.1f} {SHOWN[power]}"


def _bytes(text: str, what: str) -> int:
    found = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    if found is None:
        raise InputError(f"{what}={text!r} is not a size: {EXAMPLE}")
    number, unit = found[1].replace("_", ""), found[2].upper() or "B"
    if unit not in UNITS:
        raise InputError(
            f"{what}={text!r}: there is no unit {found[2]!r}: B, {', '.join(SHOWN[1:])} count in "
            "1,024, KB, MB, GB, TB in 1,000"
        )
    return int(Fraction(number) * UNITS[unit])
