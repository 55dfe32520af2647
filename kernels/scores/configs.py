"""Launch configurations of the scores room, chosen with the offline compiler."""

from __future__ import annotations

from typing import NamedTuple

import triton


class Config(NamedTuple):
    """What a program holds and what it reads per step (rows of queries or keys), warps, and steps
    that are loaded ahead.
    """

    held: int
    read: int
    warps: int
    stages: int


# (arch family, bytes of one key) -> Config; no spills, 16-byte asynchronous copies
CONFIGS = {
    ("sm", 64): Config(128, 64, 4, 3),
    ("sm", 128): Config(128, 64, 4, 3),
    ("sm", 256): Config(128, 64, 4, 3),
    ("sm", 512): Config(64, 64, 4, 2),
    ("sm", 1024): Config(64, 32, 4, 2),
    ("gfx", 64): Config(128, 64, 4, 2),
    ("gfx", 128): Config(128, 64, 4, 2),
    ("gfx", 256): Config(128, 64, 4, 2),
    ("gfx", 512): Config(64, 32, 4, 2),
    ("gfx", 1024): Config(32, 32, 4, 1),
}
# no matrix unit multiplies fp32 exactly: what is held has to fit into registers
NARROW_EXACT, WIDE_EXACT = Config(32, 32, 8, 1), Config(16, 16, 4, 1)
INTERPRETED = Config(16, 32, 1, 1)


def config(arch: str, width: int, itemsize: int) -> Config:
    """The launch configuration for keys of `width` channels of `itemsize` bytes."""
    family = "sm" if arch.startswith("sm") else "gfx"
    if arch == "interpreter":
        return INTERPRETED
    if itemsize == 4:
        return NARROW_EXACT if width <= 128 else WIDE_EXACT
    size = triton.next_power_of_2(max(width * itemsize, 64))
    return CONFIGS[family, min(size, 1024)]
