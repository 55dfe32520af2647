"""KNorm: the shortest keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.policy import Attributes, Budget, Select, check_at_least, check_budget, check_choice


@dataclass(frozen=True)
class KNorm(Select):
    """Keep the `budget` tokens whose keys have the smallest L2 norm: no attention is needed.

    Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
    section 3.

    Exact: the norm, in fp32 (rotation does not change it). `sinks` and `recent` protect the first
    and the newest tokens (published: none; the first layers are left alone there: `PerLayer`).
    Models that normalise keys (QK-norm) make all norms equal: choose another method for them.
    """

    budget: Budget = 0.25
    sinks: int = 0
    recent: int = 0
    interval: int = 64
    positions: str = "absolute"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.11430"
    score: ClassVar[str] = "score_key_norm"
    select: ClassVar[str] = "select_top"

    def __post_init__(self) -> None:
        check_budget("KNorm", self.budget)
        for field, least in (("sinks", 0), ("recent", 0), ("interval", 1)):
            check_at_least("KNorm", field, getattr(self, field), least)
        check_choice("KNorm", "positions", self.positions, ("cache", "absolute"))

    def attributes(self) -> Attributes:
        """The protected tokens."""
        return {"sinks": self.sinks, "recent": self.recent}

    def least(self) -> int:
        """The protected tokens and one more."""
        return self.sinks + self.recent + 1
