"""What a store counts."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

KEPT_REASONS = 100


@dataclass
class Stats:
    """Answers and empty answers of `get`, `load` and `find_prefix`, segments that a tier dropped
    for its budget, and what was not stored or not believed: how often, and the newest reasons.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    refusals: int = 0
    reasons: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_REASONS))

    def refuse(self, what: str, reason: object) -> None:
        """Count a refusal of `what`: a key, or the name of a file."""
        self.refusals += 1
        self.reasons.append(f"{what}: {reason}")
