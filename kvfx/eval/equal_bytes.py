"""Policies at equal bytes: each with the largest budget whose cache fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvfx.cache import budgeted
from kvfx.errors import CapacityExceeded, InputError, PolicyError, UnsupportedShape
from kvfx.fit import fitted, sites_of
from kvfx.geometry import Site
from kvfx.memory import site_bytes
from kvfx.planner import make_plan
from kvfx.policies import Full
from kvfx.policy import Allocate, Policy
from kvfx.report import short_policy
from kvfx.sizes import parse_size, size_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvfx.calibration import Calibration

# fractions are rounded down to so many digits: they are read by people
DIGITS = 4


def at_equal_bytes(
    model: PreTrainedModel,
    policies: Sequence[Policy],
    memory: Sequence[float | int | str],
    *,
    tokens: int,
    calibration: Calibration | None,
    refused: dict[str, str],
) -> tuple[Policy, ...]:
    """Every policy at each `memory`, for one row of `tokens` tokens and no more; what does not fit
    is noted in `refused`.
    """
    sites = sites_of(model, strict=True)
    found: dict[Policy, None] = {}
    for part in memory:
        size = _bytes(part, sites, tokens)
        for policy in policies:
            try:
                found[_fitting(policy, sites, size, tokens, calibration)] = None
            except (CapacityExceeded, PolicyError, UnsupportedShape) as error:
                refused[f"{short_policy(policy)} in {size_text(size)}"] = str(error)
    return tuple(found)


def _fitting(
    policy: Policy,
    sites: tuple[Site, ...],
    memory: int,
    tokens: int,
    calibration: Calibration | None,
) -> Policy:
    plan = fitted(
        policy,
        sites,
        memory,
        batch=1,
        context=tokens,
        calibration=calibration,
        max_length=tokens,
    )
    if plan.budget is None:
        return plan.asked
    if not any(isinstance(part, Allocate) for part in policy.parts()):
        # a count: of a fraction, less would be kept of a prompt than of all that is read
        return policy.with_budget(budgeted(plan.budget, tokens))
    scale = 10**DIGITS
    budget = math.floor(plan.budget * scale) / scale
    return policy.with_budget(budget) if budget > 0.0 else plan.asked


def _bytes(part: float | int | str, sites: tuple[Site, ...], tokens: int) -> int:
    """A size; or a part of what sites that see all tokens take in a dense cache, and the windows of
    the others.
    """
    if not isinstance(part, float):
        return parse_size(part)
    if not 0.0 < part <= 1.0:
        raise InputError(f"memory={part!r}: a part of the dense cache is above 0 and at most 1")
    whole = rest = 0
    for site in make_plan(Full(), sites).sites:
        size = site_bytes(site, 1, tokens, max_length=tokens)
        if site.site.window is None:
            whole += size
        else:
            rest += size
    return rest + math.floor(part * whole)
