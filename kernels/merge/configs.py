"""Launch configurations of the merge room, chosen with the offline compiler."""

from __future__ import annotations

from typing import NamedTuple

import triton


class Config(NamedTuple):
    """Channels of all rows of a tile, rows of a tile at most, and warps."""

    elements: int
    most: int
    warps: int

    def rows(self, width: int) -> int:
        """How many rows of `width` channels a tile has."""
        return max(4, min(self.most, self.elements // triton.next_power_of_2(width)))


# arch family -> Config: a tile's sums and its rows fit into registers
CONFIGS = {
    "sm": Config(2048, 64, 4),
    "gfx": Config(2048, 64, 4),
    "interpreter": Config(256, 8, 1),
}
# kept rows that share a tile of evicted ones, and the rows of such a tile
AHEAD = {"sm": (32, 32, 4), "gfx": (32, 32, 4), "interpreter": (16, 16, 1)}


def config(arch: str) -> Config:
    """The launch configuration of tiles of rows."""
    return CONFIGS[_family(arch)]


def ahead_config(arch: str) -> tuple[int, int, int]:
    """Kept rows, evicted rows and warps of `ahead`."""
    return AHEAD[_family(arch)]


def _family(arch: str) -> str:
    return arch if arch == "interpreter" else "gfx" if arch.startswith("gfx") else "sm"
