"""CacheLatent: not keys and values, but what they are computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfx.cache import BATCH, CAPACITY, Buffer, Count, in_buckets
from kvfx.geometry import Site
from kvfx.policy import Store, check_choice


@dataclass(frozen=True)
class CacheLatent(Store):
    """Keep the narrowest tensors that keys and values are computed from token by token, and compute
    keys and values again when they are attended to
    (https://arxiv.org/abs/2405.04434, section 2.1).

    Exact: everything, up to rounding. For multi-head latent attention they are the compressed
    latent and the rotated key that heads share; elsewhere what the compiler finds, if it finds
    anything narrower. Each step computes K and V of all entries. With `absorb`, where they are
    linear in what is kept, it attends to that instead (as one KV head that all query heads share),
    through matrices that are made of the weights when the model is compiled.
    """

    absorb: bool = False

    paper: ClassVar[str] = "https://arxiv.org/abs/2405.04434"
    room: ClassVar[str] = "latent"
    croppable: ClassVar[bool] = True
    rebuilds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("CacheLatent", "absorb", self.absorb, (False, True))

    def buffers(self, site: Site) -> dict[str, Buffer]:
        """latent [B, 1, C, W], which all heads share, and the live length [B, K]."""
        return {
            "latent": Buffer((BATCH, 1, CAPACITY, sum(site.latent)), site.dtype),
            "length": Buffer((BATCH, site.kv_heads), torch.int32, counter=True),
        }

    def capacity(self, entries: Count, *, bounded: bool) -> Count:
        """Exactly `entries` where their number is bounded, else the next bucket."""
        return entries if bounded else in_buckets(entries)

    def constraint(self, site: Site) -> str | None:
        """There must be something narrower than keys and values."""
        if site.latent and self.absorb and not site.linear:
            return "K and V are not linear in what they are computed from: absorb=False serves them"
        if site.latent:
            return None
        width = site.width * site.dtype.itemsize
        return (
            f"K and V are not computed from anything narrower: {width} bytes per token either way"
        )
