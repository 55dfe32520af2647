"""What is computed of a prompt whose rows are stored in part: the new ones, and some of the others
again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfx.passes.insert_reuse import Check
from kvfx.policy import Reuse
from kvfx.reuse.finders import Found
from kvfx.reuse.runner import LiveRows, Runner


@dataclass(frozen=True, eq=False)
class Computed:
    """What was done about the rows of a prompt: how many were `new`, `repaired`, and left
    `approximate`; how far they are from exact arithmetic; and for repairs while decoding, the
    deviation [K, N] of approximate rows and the attention [K, N] of the last one.
    """

    new: int
    repaired: int
    approximate: int
    depth: int
    deviation: Tensor | None = None
    attention: Tensor | None = None
    first: int = 0


def compute(
    runner: Runner,
    policy: Reuse,
    rows: LiveRows,
    tokens: Sequence[int],
    found: Sequence[Found],
) -> Computed:
    """Compute what was not found of `tokens`, and what `policy` computes again, into `rows`."""
    known, exact = (torch.zeros(len(tokens), dtype=torch.bool) for _ in range(2))
    for each in found:
        known[each.start : each.stop] = True
        exact[each.start : each.stop] = each.exact
    loose, new = known & ~exact, int((~known).sum())
    depth = max((each.segment.depth for each in found if not each.exact), default=-1) + 1
    if policy.check is None or not loose.any():
        wanted = ~known
        for each in found:
            if not each.exact:
                wanted[each.start : min(each.stop, each.start + policy.leading)] = True
        _run(runner, rows, tokens, wanted)
        left = int((loose & ~wanted).sum())
        return Computed(new, int(loose.sum()) - left, left, depth if left else 0)
    # an exact prefix is never computed again
    first = int((~exact).nonzero()[0])
    must, may = ~known[first:], loose[first:]
    must[-1] = True
    # the last row is computed in any case
    may = may & ~must
    keep = int(must.sum()) + math.ceil(policy.ratio * int(may.sum()))
    checked = runner.precheck(
        rows,
        tokens[first:],
        range(first, len(tokens)),
        must,
        may,
        keep=keep,
        check=Check(policy.layer, policy.check),
        watch=policy.layer,
    )
    chosen = torch.zeros(len(tokens), dtype=torch.bool)
    chosen[list(checked.positions)] = True
    left = loose & ~chosen
    deviation = checked.deviation.new_zeros(checked.deviation.shape[0], rows.length)
    deviation[:, first : len(tokens)] = checked.deviation * left[first:].to(deviation.device)
    count = int(left.sum())
    if count == 0:
        return Computed(new, int(loose.sum()), 0, 0)
    repaired, before = int(loose.sum()) - count, int(left.nonzero()[0])
    return Computed(new, repaired, count, depth, deviation, checked.attention, before)


def _run(runner: Runner, rows: LiveRows, tokens: Sequence[int], wanted: Tensor) -> None:
    """Compute the wanted rows."""
    positions = wanted.nonzero().flatten().tolist()
    if positions:
        runner.partial(rows, [tokens[place] for place in positions], positions, watch=None)
