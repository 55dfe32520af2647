"""Launch configurations of the compact room, chosen with the offline compiler."""

from __future__ import annotations

from typing import NamedTuple

import triton


class Config(NamedTuple):
    """Entries per step, bytes of a row that one program moves, and warps."""

    tile: int
    span: int
    warps: int

    def channels(self, width: int, itemsize: int) -> int:
        """How many of `width` channels one program moves."""
        return min(triton.next_power_of_2(width), max(1, self.span // itemsize))


# arch family -> Config; narrow spans give more programs, 64 bytes are what memory reads at once
CONFIGS = {"sm": Config(128, 64, 4), "gfx": Config(128, 64, 4), "interpreter": Config(32, 64, 1)}


def config(arch: str) -> Config:
    """The launch configuration for `arch`; what is unknown gets that of NVIDIA."""
    return CONFIGS[arch if arch == "interpreter" else "gfx" if arch.startswith("gfx") else "sm"]
