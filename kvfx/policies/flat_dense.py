"""Every entry of heads that keep different numbers of tokens, in one buffer per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfx.cache import BATCH, CAPACITY, Buffer
from kvfx.geometry import Site
from kvfx.policies.full import Full


@dataclass(frozen=True)
class FlatDense(Full):
    """Keep all keys and values of a row's heads one head behind the other, so that memory is their
    sum and not the longest head's, as often as there are heads.

    The planner chooses it where heads differ (`AdaKV`, `KVMerger(mode="threshold")`). The flattened
    layout is that of Feng et al., "Ada-KV" (https://arxiv.org/abs/2407.11550).
    """

    room: ClassVar[str] = "flat"
    croppable: ClassVar[bool] = False
    ragged: ClassVar[bool] = True

    def buffers(self, site: Site) -> dict[str, Buffer]:
        """k and v [B, K C, D], and for each head where it starts and its live length [B, K]."""
        slots, count = site.kv_heads * CAPACITY, (BATCH, site.kv_heads)
        return {
            "k_flat": Buffer((BATCH, slots, site.head_dim), site.dtype),
            "v_flat": Buffer((BATCH, slots, site.value_dim), site.dtype),
            "start": Buffer(count, torch.int32, counter=True),
            "length": Buffer(count, torch.int32, counter=True),
        }

    def number(self, site: Site, dtype: torch.dtype) -> Buffer:
        """One number per slot."""
        return Buffer((BATCH, site.kv_heads * CAPACITY), dtype)
