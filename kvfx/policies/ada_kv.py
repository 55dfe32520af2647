"""AdaKV: heads that spread their attention keep more tokens than heads that do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.policy import Attributes, Divide, Select, check_fraction


@dataclass(frozen=True)
class AdaKV(Divide):
    """Divide the entries of a row among its KV heads: the best-scored rows of all heads stay, and
    each head keeps at least `floor` of its even share. Use it with a method that scores tokens:
    `SnapKV(0.25) | AdaKV()`.

    Source: Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for
    Efficient LLM Inference", and its code.

    Exact: the sum over heads is that of an even division, and memory is that sum (a flattened
    cache, `FlatDense`). Different: the floor is a hard one (the published code mixes the counts and
    rounds, so that its sum may differ).
    """

    floor: float = 0.2
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.11550"
    divide: ClassVar[str] = "allocate_heads"

    def __post_init__(self) -> None:
        check_fraction("AdaKV", "floor", self.floor)

    def attributes(self, select: Select) -> Attributes:
        """What stays in every head, and the floor."""
        return {**select.protected(), "floor": float(self.floor)}
