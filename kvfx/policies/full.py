"""Every entry, as the model computed it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfx.cache import BATCH, CAPACITY, Buffer, Count, in_buckets
from kvfx.geometry import Site
from kvfx.policy import Store


@dataclass(frozen=True)
class Full(Store):
    """Keep all keys and values in the model's dtype: exact, and the format that other policies are
    measured against.
    """

    room: ClassVar[str] = "dense"
    croppable: ClassVar[bool] = True
    compacts: ClassVar[bool] = True
    biased: ClassVar[bool] = True

    def buffers(self, site: Site) -> dict[str, Buffer]:
        """k and v [B, K, C, D] and the live length [B, K]."""
        return {
            "k_cache": Buffer((BATCH, site.kv_heads, CAPACITY, site.head_dim), site.dtype),
            "v_cache": Buffer((BATCH, site.kv_heads, CAPACITY, site.value_dim), site.dtype),
            "length": Buffer((BATCH, site.kv_heads), torch.int32, counter=True),
        }

    def capacity(self, entries: Count, *, bounded: bool) -> Count:
        """Exactly `entries` where their number is bounded, else the next bucket."""
        return entries if bounded else in_buckets(entries)
