"""KIVI: old entries as 2, 4 or 8 bit codes, the newest ones exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfx.cache import BATCH, BUCKET, CAPACITY, Buffer, Count, Extent, at_least, in_steps
from kvfx.errors import PolicyError
from kvfx.geometry import Site
from kvfx.policy import Store, check_at_least, check_choice

BITS = (2, 4, 8)
MODES = ("kivi", "window")
# narrower groups would cost more for scales and zeros than they save
LEAST_GROUP = 32


@dataclass(frozen=True)
class KIVI(Store):
    """Keep keys as codes per channel and values as codes per token
    (https://arxiv.org/abs/2402.02750).

    `k_bits` and `v_bits` default to `bits`; a group of `group_size` tokens (keys) or channels
    (values) shares one fp16 scale and zero. Exact: the prompt's attention and the newest tokens.
    With `mode="kivi"` those are the published ones: the newest `residual` values, and the keys
    since the last multiple of `residual`. With `mode="window"` keys and values share one window,
    flushed in blocks of `group_size`, in which at least the newest `residual` tokens are exact.
    Not exact: everything older, by at most half a scale per element (and the fp16 rounding of its
    zero).
    """

    bits: int = 2
    k_bits: int | None = None
    v_bits: int | None = None
    group_size: int = 32
    residual: int = 128
    mode: str = "window"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.02750"
    room: ClassVar[str] = "kivi"
    flushes: ClassVar[bool] = True
    biased: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check every knob."""
        check_choice("KIVI", "bits", self.bits, BITS)
        check_choice("KIVI", "k_bits", self.k_bits, (None, *BITS))
        check_choice("KIVI", "v_bits", self.v_bits, (None, *BITS))
        check_choice("KIVI", "mode", self.mode, MODES)
        check_at_least("KIVI", "group_size", self.group_size, LEAST_GROUP)
        check_at_least(
            "KIVI", "residual", self.residual, self.group_size if self.mode == "kivi" else 0
        )
        for field, value, factor in (
            ("group_size", self.group_size, LEAST_GROUP),
            ("residual", self.residual, self.group_size),
        ):
            if value % factor:
                raise PolicyError(
                    f"KIVI({field}={value!r}): {field} must be a multiple of {factor}"
                )

    @property
    def key_bits(self) -> int:
        """Bits per key channel."""
        return self.bits if self.k_bits is None else self.k_bits

    @property
    def value_bits(self) -> int:
        """Bits per value channel."""
        return self.bits if self.v_bits is None else self.v_bits

    def buffers(self, site: Site) -> dict[str, Buffer]:
        """Words, scales, zeros per tile of `group_size` tokens, rings of exact rows, counters."""
        heads, tiles, group = site.kv_heads, CAPACITY / self.group_size, self.group_size
        k_ring, v_ring = self.residual + group, self.residual + group
        if self.mode == "kivi":
            k_ring, v_ring = self.residual, self.residual + 1
        values = (BATCH, heads, tiles, group, site.value_dim // group)
        counter = Buffer((BATCH, heads), torch.int32, counter=True)
        return {
            "k_codes": Buffer(
                (BATCH, heads, tiles, *words(site.head_dim, group, self.key_bits)), torch.int16
            ),
            "k_scales": Buffer((BATCH, heads, tiles, site.head_dim), torch.float16),
            "k_zeros": Buffer((BATCH, heads, tiles, site.head_dim), torch.float16),
            "v_codes": Buffer(
                (BATCH, heads, tiles, *words(site.value_dim, group, self.value_bits)), torch.int16
            ),
            "v_scales": Buffer(values, torch.float16),
            "v_zeros": Buffer(values, torch.float16),
            "k_residual": Buffer((BATCH, heads, k_ring, site.head_dim), site.dtype),
            "v_residual": Buffer((BATCH, heads, v_ring, site.value_dim), site.dtype),
            "length": counter,
            "k_quantized": counter,
            "v_quantized": counter,
        }

    def attributes(self, site: Site) -> dict[str, int | float | str]:
        """The knobs, as every op of the room takes them."""
        del site
        return {
            "k_bits": self.key_bits,
            "v_bits": self.value_bits,
            "group_size": self.group_size,
            "residual": self.residual,
            "rule": self.mode,
        }

    def entries(self) -> Extent:
        """Codes, and the ring of exact keys."""
        ring = self.residual if self.mode == "kivi" else self.residual + self.group_size
        return CAPACITY + ring

    def capacity(self, entries: Count, *, bounded: bool) -> Count:
        """Entries to allocate as codes; exact ones live in rings, whose size is fixed."""
        coded = entries if self.mode == "kivi" else at_least(entries - self.residual, 1)
        step = self.group_size if bounded else math.lcm(BUCKET, self.group_size)
        return in_steps(coded, step)

    def flush_due(self, length: int) -> bool:
        """Whether a ring is full at `length` entries."""
        if self.mode == "kivi":
            return length > 0 and length % self.residual == 0
        return length > self.residual and (length - self.residual) % self.group_size == 0

    def constraint(self, site: Site) -> str | None:
        """Groups must fill the channels of a row."""
        for name, size in (("head_dim", site.head_dim), ("value_dim", site.value_dim)):
            if size % self.group_size:
                return f"{name} {size} is not a multiple of group_size {self.group_size}"
        return None


def words(width: int, tokens: int, bits: int) -> tuple[int, int]:
    """Rows, and int16 words per row, of a tile [tokens, width] (`Planes` of the kernel room)."""
    planes = 16 // bits
    while width % planes or width // planes < LEAST_GROUP:
        planes //= 2
    return tokens * planes * bits // 16, width // planes
