"""Layers that keep different numbers of entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvfx.errors import CalibrationError, PolicyError
from kvfx.geometry import Site
from kvfx.policies.h2o import H2O
from kvfx.policy import Allocate, Budget, Measurements, Policy, Select, check_budget, known_budget


@dataclass(frozen=True)
class LayerBudgets(Allocate):
    """Keep `budget` entries on average; layer i in proportion to `shares[i]`.

    Every allocator becomes this: what it found for a model is plain numbers, which can be written
    down and used again. With a select policy it says how many that policy keeps; alone, heavy
    hitters stay (`H2O`). Counts are whole numbers whose sum is exact.
    """

    budget: Budget
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        check_budget("LayerBudgets", self.budget)
        if not all(math.isfinite(share) and share >= 0.0 for share in self.shares):
            raise PolicyError(
                f"LayerBudgets(shares={self.shares!r}): shares are numbers of at least 0"
            )

    def alone(self) -> Select:
        """Heavy hitters."""
        return H2O(budget=self.budget)

    def shares_of(self, sites: Sequence[Site], total: int) -> tuple[float, ...]:
        """The shares of those of `total` sites that select."""
        if len(self.shares) != total:
            raise PolicyError(
                f"LayerBudgets: {len(self.shares)} shares for a model of {total} sites"
            )
        chosen = tuple(self.shares[site.index] for site in sites)
        if sites and not sum(chosen) > 0.0:
            raise PolicyError("LayerBudgets: every layer that selects has the share 0")
        return chosen


def calibrated(
    policy: Policy, calibration: Measurements | None, sites: Sequence[Site]
) -> tuple[Measurements, list[int]]:
    """The calibration that `policy` needs, and the indices of the sites that it knows.

    Raises CalibrationError where there is none, or none for these sites.
    """
    if calibration is None:
        raise CalibrationError(
            f"{policy!r} is decided by measurements of the model: pass "
            "calibration=kvfx.calibrate(model)"
        )
    names = tuple(site.name for site in sites)
    if calibration.sites != names:
        raise CalibrationError(
            f"the calibration is of {len(calibration.sites)} sites, the model has {len(names)}, or "
            "others: calibrate this model"
        )
    known = calibration.statistic("retention").isfinite().all(-1).all(0)
    return calibration, [index for index in range(len(sites)) if bool(known[index])]


def shares_by(
    policy: Allocate,
    calibration: Measurements | None,
    sites: Sequence[Site],
    statistics: Sequence[str],
    rule: Callable[..., tuple[float, ...]],
) -> LayerBudgets:
    """The budgets that `rule` computes from statistics [P, L, ...] of the measured sites."""
    calibration, known = calibrated(policy, calibration, sites)
    found = dict(
        zip(
            known,
            rule(*(calibration.statistic(name)[:, known] for name in statistics)),
            strict=True,
        )
    )
    return LayerBudgets(policy.budget, tuple(found.get(index, 0.0) for index in range(len(sites))))


def fraction_of(policy: Allocate, calibration: Measurements | None) -> float:
    """The budget as a part of the tokens: a count, as a part of a calibration prompt."""
    budget = known_budget(policy.budget)
    if isinstance(budget, float) or calibration is None:
        return float(budget)
    return min(1.0, budget / calibration.tokens)
