"""KeyDiff: the keys that differ most from the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.policy import Attributes, Budget, Select, check_at_least, check_budget, check_choice


@dataclass(frozen=True)
class KeyDiff(Select):
    """Keep the `budget` tokens whose keys have the smallest cosine with the mean direction of all
    keys: no attention is needed.

    Source: Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM
    Inference in Resource-Constrained Environments", section 4.

    Exact: rotated keys, normalised in fp32, mean over the entries that are there. `sinks` and
    `recent` protect the first and the newest tokens (published: none). During decode, entries are
    ranked anew `interval` at a time.
    """

    budget: Budget = 0.25
    sinks: int = 0
    recent: int = 0
    interval: int = 64
    positions: str = "absolute"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.15364"
    score: ClassVar[str] = "score_key_difference"
    select: ClassVar[str] = "select_top"

    def __post_init__(self) -> None:
        check_budget("KeyDiff", self.budget)
        for field, least in (("sinks", 0), ("recent", 0), ("interval", 1)):
            check_at_least("KeyDiff", field, getattr(self, field), least)
        check_choice("KeyDiff", "positions", self.positions, ("cache", "absolute"))

    def attributes(self) -> Attributes:
        """The protected tokens."""
        return {"sinks": self.sinks, "recent": self.recent}

    def least(self) -> int:
        """The protected tokens and one more."""
        return self.sinks + self.recent + 1
