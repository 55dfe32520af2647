"""CaM: the values of evicted tokens are added to those that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.geometry import Site
from kvfx.policy import Attributes, Merge, check_at_least


@dataclass(frozen=True)
class CaM(Merge):
    """Share the value of each evicted token out among the next `targets` kept ones, with the
    probability that its attention bears to theirs; keys are dropped. Use it with a method that
    evicts: `StreamingLLM(0.2) | CaM()`, `H2O(0.2) | CaM()`.

    Source: Zhang et al., "CaM: Cache Merging for Memory-efficient LLMs Inference" (ICML 2024),
    and its code.

    Exact: the probability is the mean attention that the token got over that of its targets, at
    most 1; the value is divided by their number. The three published code paths disagree about what
    is compared; attention per row that saw the token is compared here, since sums grow with age
    (compared with sums, the newest tokens drown in values that are added to them). Different:
    values go straight to tokens that stay, not from one evicted token to the next. Draws depend on
    `seed`, the token's position and the head, not on the batch.
    """

    targets: int = 32
    seed: int = 0
    paper: ClassVar[str] = "https://openreview.net/forum?id=LCTmppB165"
    merge: ClassVar[str] = "merge_ahead"
    score: ClassVar[str] = "score_columns"
    decay: ClassVar[float] = 1.0
    averaged: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_at_least("CaM", "targets", self.targets, 1)
        check_at_least("CaM", "seed", self.seed, 0)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The attention that entries got, and where they are."""
        return ("score", "position")

    def score_attributes(self, site: Site) -> Attributes:
        """The scale of the site's scores."""
        return {"scale": site.scale}

    def merge_attributes(self, site: Site) -> Attributes:
        """How far values are spread, and a seed of each layer's own."""
        return {"targets": self.targets, "seed": self.seed * 1_000_003 + site.index}
