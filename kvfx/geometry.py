"""The static facts of a model's attention: what each site computes, before any policy is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Causal:
    """Row q sees every key with `0 <= pos_k <= pos_q`."""

    def __str__(self) -> str:
        return "causal"


@dataclass(frozen=True)
class Window:
    """Row q sees the newest `size` keys, itself included: `pos_q - pos_k < size`."""

    size: int

    def __str__(self) -> str:
        return f"window {self.size}"


@dataclass(frozen=True)
class Unproven:
    """Who sees what is known to the model alone; `reason` says why no family fits its mask."""

    reason: str

    def __str__(self) -> str:
        return "unproven"


Mask = Causal | Window | Unproven


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: the first `2 * len(frequencies)` channels turn by `position * frequency`
    radians.

    `style` is `"half"` (channel i pairs with i + width / 2) or `"interleaved"` (2i with 2i + 1).
    """

    style: str
    frequencies: tuple[float, ...]

    @property
    def width(self) -> int:
        """Channels that are rotated."""
        return 2 * len(self.frequencies)

    def __str__(self) -> str:
        return f"{self.style} {self.width}"


@dataclass(frozen=True)
class Site:
    """One attention computation of the model, named by module path."""

    index: int
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    mask: Mask
    rope: Rope | None
    dtype: torch.dtype
    device: torch.device

    @property
    def kv_repeat(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    def is_outer(self, sites: int) -> bool:
        """Whether it is one of the first two of `sites` or the last: several papers leave those
        alone.
        """
        return self.index in (0, 1, sites - 1)

    @property
    def window(self) -> int | None:
        """The sliding window of the model at this site, if it has one."""
        return self.mask.size if isinstance(self.mask, Window) else None


@dataclass(frozen=True)
class Geometry:
    """All sites of a model, in the order in which they run."""

    sites: tuple[Site, ...]
