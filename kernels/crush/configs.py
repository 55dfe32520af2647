"""Launch configurations of the crush room, chosen with the offline compiler."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Rows per program and warps."""

    rows: int
    warps: int


# (arch family, whether tokens are searched by their positions) -> Config: 16 bits of a head are one
# load of 16 bytes; a search waits for memory, so more threads do it
CONFIGS = {
    ("sm", False): Config(2048, 4),
    ("sm", True): Config(1024, 8),
    ("gfx", False): Config(2048, 4),
    ("gfx", True): Config(1024, 8),
}
INTERPRETED = Config(32, 1)


def config(arch: str, *, searched: bool) -> Config:
    """The launch configuration of both kernels; any arch that is no NVIDIA one is "gfx"."""
    if arch == "interpreter":
        return INTERPRETED
    return CONFIGS["sm" if arch.startswith("sm") else "gfx", searched]
