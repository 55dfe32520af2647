"""StreamingLLM: the first tokens and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.policy import Attributes, Budget, Select, check_at_least, check_budget, check_choice


@dataclass(frozen=True)
class StreamingLLM(Select):
    """Keep `sinks` first tokens and the newest ones, `budget` in total: attention over an endless
    stream.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", section 3.2.

    `positions="cache"` is the published method: keys are rotated to their index in the cache, and
    so is the query.
    `positions="absolute"` leaves rotary positions as they were when tokens were read. `interval`
    entries are appended between two evictions (published: 1), so at most budget + interval are ever
    held. Exact: which tokens are kept, and the rotation (fp32). Different: the prompt's own
    attention is dense, as for every policy here, and only then trimmed.
    """

    budget: Budget = 0.25
    sinks: int = 4
    interval: int = 64
    positions: str = "cache"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.17453"
    select: ClassVar[str] = "select_recent"

    def __post_init__(self) -> None:
        check_at_least("StreamingLLM", "sinks", self.sinks, 0)
        check_budget("StreamingLLM", self.budget)
        check_at_least("StreamingLLM", "interval", self.interval, 1)
        check_choice("StreamingLLM", "positions", self.positions, ("cache", "absolute"))

    def attributes(self) -> Attributes:
        """The number of sinks."""
        return {"sinks": self.sinks}

    def least(self) -> int:
        """The sinks and one recent token."""
        return self.sinks + 1
