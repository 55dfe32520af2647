"""SnapKV: the tokens that the end of the prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.errors import PolicyError
from kvfx.geometry import Site
from kvfx.policy import Attributes, Budget, Select, check_at_least, check_budget, check_choice


@dataclass(frozen=True)
class SnapKV(Select):
    """Keep the last `window` tokens, and of the others those to which that window gave most
    attention, summed and pooled over `pool` neighbours; `budget` in total.

    Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", section 4.

    Exact: softmax and sums in fp32, mean pooling with zeros beyond the ends (`pooling="max"` as in
    the published configurations for LongBench). Different: heads of a group share their entries, so
    their attention is averaged before pooling. Published SnapKV compresses a prompt once. Here at
    most budget + `interval` entries are ever held: decoded rows add their attention to that of the
    window, and older ones fade by 1 - 1 / 32 per row.
    """

    budget: Budget = 0.25
    window: int = 32
    pool: int = 5
    pooling: str = "mean"
    interval: int = 64
    positions: str = "absolute"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.14469"
    score: ClassVar[str] = "score_window"
    select: ClassVar[str] = "select_top"
    decay: ClassVar[float] = 1.0 - 1.0 / 32

    def __post_init__(self) -> None:
        check_budget("SnapKV", self.budget)
        for field in ("window", "pool", "interval"):
            check_at_least("SnapKV", field, getattr(self, field), 1)
        if self.pool % 2 == 0:
            raise PolicyError(f"SnapKV(pool={self.pool!r}): an odd number of neighbours")
        check_choice("SnapKV", "pooling", self.pooling, ("mean", "max"))
        check_choice("SnapKV", "positions", self.positions, ("cache", "absolute"))

    def attributes(self) -> Attributes:
        """The window always stays."""
        return {"sinks": 0, "recent": self.window}

    def score_attributes(self, site: Site) -> Attributes:
        """The scale of the site's scores, and the rows that look."""
        return {"scale": site.scale, "window": self.window}

    def least(self) -> int:
        """The window and one token more."""
        return self.window + 1
