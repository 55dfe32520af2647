"""DBudgetKV: the first tokens and as many of the newest as attention asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.errors import PolicyError
from kvfx.geometry import Site
from kvfx.policy import KEEP_ALL, Attributes, Policy, Select, check_at_least


@dataclass(frozen=True)
class DBudgetKV(Select):
    """Keep the first `sinks` tokens and the newest ones, in each head so many that the norm of the
    last row's attention falls by less than `threshold`: there is no budget.

    Source: Ni et al., "DBudgetKV: Dynamic Budget in KV Cache Compression for Ensuring Optimal
    Performance" (later: ReFreeKV), sections 2.2 and 2.3.

    Exact: four sinks, 1%, and with `skip_layers` the first two layers whole, as published. During
    decode, entries are counted anew every `interval` tokens (published: the prompt only).
    """

    threshold: float = 0.01
    sinks: int = 4
    skip_layers: bool = True
    interval: int = 64
    budget: ClassVar[float] = 1.0
    positions: ClassVar[str] = "absolute"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.16886"
    score: ClassVar[str] = "score_window"
    select: ClassVar[str] = "select_recent"
    counts: ClassVar[str] = "allocate_dbudget"
    decay: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise PolicyError(f"DBudgetKV(threshold={self.threshold!r}): between 0 and 1")
        check_at_least("DBudgetKV", "sinks", self.sinks, 0)
        check_at_least("DBudgetKV", "interval", self.interval, 1)

    def for_site(self, site: Site, sites: int) -> Policy:
        """The first two layers keep everything."""
        del sites
        return KEEP_ALL if self.skip_layers and site.index < 2 else self

    def attributes(self) -> Attributes:
        """The number of sinks."""
        return {"sinks": self.sinks}

    def score_attributes(self, site: Site) -> Attributes:
        """The scale of the site's scores; one row looks."""
        return {"scale": site.scale, "window": 1}

    def count_attributes(self) -> Attributes:
        """How much of the norm may go, and what stays in any case."""
        return {"threshold": float(self.threshold), "sinks": self.sinks}
