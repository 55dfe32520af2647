"""PyramidKV: budgets fall from the first layer to the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvfx.budgets.pyramid import pyramid_shares
from kvfx.errors import PolicyError
from kvfx.geometry import Site
from kvfx.policies.layer_budgets import LayerBudgets
from kvfx.policies.snapkv import SnapKV
from kvfx.policy import Allocate, Budget, Measurements, Select, check_budget

# the first layer keeps twice the mean at most
UNCAPPED = 0.5


@dataclass(frozen=True)
class PyramidKV(Allocate):
    """Keep `budget` entries on average, from 2 - 1 / beta times that in the first layer to 1 / beta
    times in the last, in equal steps; alone with SnapKV's choice of tokens.

    Source: Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information
    Funneling", and its code.

    Exact: the sum over layers (the published code rounds its steps down, and so exceeds it). The
    window of the select policy is in every layer's budget and is not part of the pyramid.
    """

    budget: Budget = 0.25
    beta: float = 20.0
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.02069"

    def __post_init__(self) -> None:
        check_budget("PyramidKV", self.budget)
        if not self.beta >= 1.0:
            raise PolicyError(f"PyramidKV(beta={self.beta!r}): beta is at least 1")

    def resolve(self, calibration: Measurements | None, sites: Sequence[Site]) -> LayerBudgets:
        """Shares of the sites without a window, in their order."""
        del calibration
        causal = [site.index for site in sites if site.window is None]
        # of a count it is not known here which part of the tokens it is: only the prompt caps it
        fraction = self.budget if isinstance(self.budget, float) else UNCAPPED
        shares = dict(zip(causal, pyramid_shares(len(causal), self.beta, fraction), strict=True))
        return LayerBudgets(self.budget, tuple(shares.get(site.index, 0.0) for site in sites))

    def alone(self) -> Select:
        """What the window at the end looks at."""
        return SnapKV(budget=self.budget)
