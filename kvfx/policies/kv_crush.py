"""KVCrush: some tokens stay because they represent those that go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfx.policies.h2o import H2O
from kvfx.policy import (
    Attributes,
    Budget,
    Refine,
    Select,
    check_at_least,
    check_budget,
    check_choice,
    check_fraction,
)

ANCHORS = ("mean", "random", "alternating", "zeros", "ones")


@dataclass(frozen=True)
class KVCrush(Refine):
    """Give the share `ratio` of what a select policy keeps to representatives of what it drops:
    each token has one bit per KV head, and tokens at all Hamming distances from an `anchor` stay.
    `SnapKV(0.25) | KVCrush()` refines SnapKV; alone it refines `H2O(budget)`.

    Source: Jha et al., "KVCrush: Key Value Cache Size-Reduction Using Similarity in
    Head-Behaviour", as far as it is known here; options are those of the published code.

    `bits="half"`: a head's bit says that the token is among the better half of those that could be
    dropped, as in both published implementations; `"keepset"`: that the head keeps it.
    `pick="linspace"` takes evenly spaced ranks of the tokens sorted by distance, `"stride"` a whole
    step (OpenVINO GenAI). `page` tokens are judged together. `seed` is for `anchor="random"`.
    Different: the mean anchor is taken over the tokens that could still be chosen (over all of them
    it would be zero, since each bit is set for half at most).
    """

    ratio: float = 0.25
    anchor: str = "mean"
    bits: str = "half"
    pick: str = "linspace"
    page: int = 1
    seed: int = 0
    budget: Budget = 0.2
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.00022"
    refine: ClassVar[str] = "refine_crush"

    def __post_init__(self) -> None:
        check_fraction("KVCrush", "ratio", self.ratio)
        check_choice("KVCrush", "anchor", self.anchor, ANCHORS)
        check_choice("KVCrush", "bits", self.bits, ("half", "keepset"))
        check_choice("KVCrush", "pick", self.pick, ("linspace", "stride"))
        check_at_least("KVCrush", "page", self.page, 1)
        check_at_least("KVCrush", "seed", self.seed, 0)
        check_budget("KVCrush", self.budget)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Where tokens are: heads that keep different ones compare their bits by position."""
        return ("position",)

    def attributes(self, select: Select) -> Attributes:
        """What always stays, and how representatives are found."""
        return {
            **select.protected(),
            "ratio": float(self.ratio),
            "anchor": self.anchor,
            "bits": self.bits,
            "pick": self.pick,
            "page": self.page,
            "seed": self.seed,
        }

    def alone(self) -> Select:
        """Heavy hitters."""
        return H2O(budget=self.budget)
