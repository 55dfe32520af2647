"""Every entry of a site whose mask was not proven."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.cache import Buffer, Count, in_buckets
from kvfx.geometry import Site
from kvfx.policies.full import Full
from kvfx.policy import Store


@dataclass(frozen=True)
class MaskedDense(Store):
    """Keep all entries and let the model compute its mask over them at every step.

    The planner chooses it with `strict=False` for sites whose mask belongs to no known family.
    """

    room: ClassVar[str] = "masked"
    croppable: ClassVar[bool] = True

    def buffers(self, site: Site) -> dict[str, Buffer]:
        """Those of `Full`: k and v [B, K, C, D] and the live length [B, K]."""
        return Full().buffers(site)

    def capacity(self, entries: Count, *, bounded: bool) -> Count:
        """As `Full`."""
        return entries if bounded else in_buckets(entries)
