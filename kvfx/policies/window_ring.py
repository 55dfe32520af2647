"""The newest W entries of a layer whose model sees no further."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfx.cache import BATCH, CAPACITY, Buffer, Count, at_most, in_buckets
from kvfx.geometry import Site
from kvfx.policy import Store, check_at_least


@dataclass(frozen=True)
class WindowRing(Store):
    """Keep the newest `window` entries: lossless where the model itself attends inside a sliding
    window.

    The planner chooses it for such layers, whatever the policy says about the others.
    """

    window: int
    room: ClassVar[str] = "ring"
    rows: ClassVar[str] = "positions"

    def __post_init__(self) -> None:
        check_at_least("WindowRing", "window", self.window, 1)

    def buffers(self, site: Site) -> dict[str, Buffer]:
        """k and v [B, K, C, D], the position [B, C] of each entry (-1: none), and the rows ever
        appended [B, 1].
        """
        return {
            "k_cache": Buffer((BATCH, site.kv_heads, CAPACITY, site.head_dim), site.dtype),
            "v_cache": Buffer((BATCH, site.kv_heads, CAPACITY, site.value_dim), site.dtype),
            "position": Buffer((BATCH, CAPACITY), torch.int32, fill=-1),
            "length": Buffer((BATCH, 1), torch.int32, counter=True),
        }

    def capacity(self, entries: Count, *, bounded: bool) -> Count:
        """As `Full`, but never more than the window: from there on the ring wraps."""
        return at_most(entries if bounded else in_buckets(entries), self.window)

    def attributes(self, site: Site) -> dict[str, int | float | str]:
        """The window."""
        del site
        return {"window": self.window}
