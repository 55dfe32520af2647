"""UNComp: layers whose keys are more diverse keep more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvfx.budgets.uncomp import uncomp_shares
from kvfx.geometry import Site
from kvfx.policies.layer_budgets import LayerBudgets, shares_by
from kvfx.policies.snapkv import SnapKV
from kvfx.policy import Allocate, Budget, Measurements, Select, check_budget


@dataclass(frozen=True)
class UNComp(Allocate):
    """Keep `budget` entries on average, in stages of layers that end where the matrix entropy of
    keys falls by more than `drop`, in proportion to a stage's mean entropy.

    Source: Xiong et al., "UNComp: Can Matrix Entropy Uncover Sparsity? A Compressor Design from an
    Uncertainty-Aware Perspective", and its code. Different: stages get numbers from their entropy
    (published: by hand), heads are not grouped, hidden states stay whole. Alone with SnapKV's
    choice of tokens.
    """

    budget: Budget = 0.25
    drop: float = 1.0
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.03090"

    def __post_init__(self) -> None:
        check_budget("UNComp", self.budget)

    def resolve(self, calibration: Measurements | None, sites: Sequence[Site]) -> LayerBudgets:
        """The stages' budgets."""
        return shares_by(
            self,
            calibration,
            sites,
            ["key_entropy"],
            lambda entropy: uncomp_shares(entropy, self.drop),
        )

    def alone(self) -> Select:
        """What the window at the end looks at."""
        return SnapKV(budget=self.budget)
