"""Launch configurations of the kivi room, chosen with the offline compiler."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Blocks of tiles per step (a block is as many tiles as a product needs), warps, and steps that
    are loaded ahead.
    """

    blocks: int
    warps: int
    stages: int


# (arch family, most bits, tokens of a tile); no spills, and on NVIDIA 16-byte asynchronous copies
CONFIGS = {
    ("sm", 2, 32): Config(1, 2, 2),
    ("sm", 2, 64): Config(1, 2, 2),
    ("sm", 2, 128): Config(1, 2, 3),
    ("sm", 4, 32): Config(1, 1, 3),
    ("sm", 4, 64): Config(1, 2, 3),
    ("sm", 4, 128): Config(1, 4, 3),
    ("sm", 8, 32): Config(1, 2, 2),
    ("sm", 8, 64): Config(1, 2, 3),
    ("sm", 8, 128): Config(1, 4, 2),
    ("gfx", 2, 32): Config(1, 1, 2),
    ("gfx", 2, 64): Config(1, 2, 2),
    ("gfx", 2, 128): Config(1, 4, 2),
    ("gfx", 4, 32): Config(1, 1, 2),
    ("gfx", 4, 64): Config(1, 2, 2),
    ("gfx", 4, 128): Config(1, 4, 2),
    ("gfx", 8, 32): Config(1, 1, 2),
    ("gfx", 8, 64): Config(1, 4, 2),
    ("gfx", 8, 128): Config(1, 4, 2),
}
# the same where query heads are columns, which is for 2 bits
NARROW = {
    ("sm", 32): Config(1, 1, 3),
    ("sm", 64): Config(1, 1, 2),
    ("sm", 128): Config(1, 2, 3),
    ("gfx", 32): Config(1, 1, 2),
    ("gfx", 64): Config(1, 2, 2),
    ("gfx", 128): Config(1, 4, 2),
}
# rows of more channels fill the registers of twice the warps, or of no number of them
WIDE = 128
# elements of a tile that is too small for a product
SHORT = 64 * 32
# tokens one by one, for fp32 and for sizes that are no powers of two
PLAIN = Config(1, 4, 1)
INTERPRETED = Config(2, 1, 1)


def config(
    arch: str, k_bits: int, v_bits: int, group_size: int, width: int, *, fast: bool, narrow: bool
) -> Config:
    """The launch configuration for codes of these bits and rows of at most `width` channels."""
    if arch == "interpreter":
        return INTERPRETED
    if not fast:
        return PLAIN
    family, tokens = "sm" if arch.startswith("sm") else "gfx", min(group_size, 128)
    chosen = NARROW[family, tokens] if narrow else CONFIGS[family, max(k_bits, v_bits), tokens]
    if width > WIDE:
        return chosen._replace(warps=chosen.warps * 2, stages=2)
    # short rows come as several tiles at once
    if k_bits != v_bits:
        # two ways of unpacking share the registers
        return chosen._replace(warps=4, stages=2)
    if narrow and width * tokens <= SHORT:
        return chosen._replace(warps=2 if family == "sm" else 1, stages=2)
    return chosen


def with_scores(chosen: Config) -> Config:
    """The same where scores are written: their addresses do not fit beside what one warp holds."""
    return chosen._replace(warps=max(chosen.warps, 2))


def with_rules(chosen: Config, arch: str) -> Config:
    """The same under rules: on AMD their numbers do not fit beside what one warp holds."""
    return chosen if arch.startswith("sm") else with_scores(chosen)


def serves(arch: str, sizes: tuple[int, ...], *, exact: bool) -> bool:
    """Whether whole tiles are read without unpacking them, for widths and a group size `sizes`.

    Other sizes than powers of two do not fill the blocks of a product, products of fp32 take no
    tensor cores and too many registers, and so do wide rows on AMD.
    """
    if any(size & (size - 1) for size in sizes):
        return False
    if arch == "interpreter":
        return True
    return not exact and (arch.startswith("sm") or max(sizes[:-1]) <= WIDE)
