"""Every entry of a site whose mask was not proven."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfx.cache import BATCH, CAPACITY, Buffer, in_buckets
from kvfx.geometry import Site
from kvfx.policy import Store


@dataclass(frozen=True)
class MaskedDense(Store):
    """Keep all entries and let the model compute its mask over them at every step.

    The planner chooses it with `strict=False` for sites whose mask belongs to no known family.
    """

    room: ClassVar[str] = "masked"
    croppable: ClassVar[bool] = True

    def buffers(self, site: Site) -> dict[str, Buffer]:
        """k and v [B, K, C, D] and the live length [B, K]."""
        return {
            "k_cache": Buffer((BATCH, site.kv_heads, CAPACITY, site.head_dim), site.dtype),
            "v_cache": Buffer((BATCH, site.kv_heads, CAPACITY, site.value_dim), site.dtype),
            "length": Buffer((BATCH, site.kv_heads), torch.int32, counter=True),
        }

    def capacity(self, entries: int, *, bounded: bool) -> int:
        """The next bucket."""
        del bounded
        return in_buckets(entries)
