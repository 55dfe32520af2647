"""What a plan costs in bytes: exact for a batch, a prompt and the tokens decoded after it, or as a
sympy expression of these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import sympy

from kvfx.cache import CAPACITY, Count, at_most, evaluated
from kvfx.errors import CapacityExceeded, PolicyError
from kvfx.planner import Plan, Schedule, SitePlan
from kvfx.policy import check_at_least
from kvfx.sizes import parse_size, size_text

# tokens of the prompt of every row, and tokens decoded after it
LENGTH = sympy.Symbol("length", positive=True, integer=True)
NEW = sympy.Symbol("new", nonnegative=True, integer=True)
# a cache that still fits at so many tokens or rows does not grow with them; fractions are looked
# for in steps of its inverse, the spacing of doubles below 1
MOST = 2**53


def memory_bytes(
    plan: Plan, batch: int, length: int, new: int = 0, max_length: int | None = None
) -> int:
    """Bytes of all buffers after a prompt of `length` tokens per row and `new` decoded ones: what
    is allocated then, and the most that was since the prompt was read. `max_length` is that of
    `compress`.

    An upper bound where the plan is not exact (see `is_exact`), which a prompt reaches before it is
    compressed. A prompt that follows on another, or a chunk of one, needs room for its own rows
    besides, until it is compressed.
    """
    return sum(
        count * evaluated(formula, batch, capacity(schedule, length, new, max_length))
        for (formula, schedule), count in _kinds(plan).items()
    )


def memory_formula(plan: Plan, max_length: int | None = None) -> sympy.Expr:
    """The same as an expression in `batch` (`kvfx.cache.BATCH`), `length` and `new` (`LENGTH`,
    `NEW`): with integers for them it is that number.
    """
    return sympy.Add(
        *(
            count * formula.subs(CAPACITY, capacity(schedule, LENGTH, NEW, max_length))
            for (formula, schedule), count in _kinds(plan).items()
        )
    )


def site_bytes(
    plan: SitePlan, batch: int, length: int, new: int = 0, max_length: int | None = None
) -> int:
    """Bytes of one site's buffers after a prompt of `length` tokens per row and `new` decoded
    ones.
    """
    return evaluated(site_formula(plan), batch, capacity(plan.schedule, length, new, max_length))


def site_formula(plan: SitePlan) -> sympy.Expr:
    """Bytes of one site's buffers in `BATCH` and `CAPACITY`."""
    return sympy.Add(*(buffer.bytes() for buffer in plan.buffers.values()))


def is_exact(plan: Plan) -> bool:
    """Whether bytes are known before anything is read: sites that keep what the data tell are
    counted as if all of it stayed.
    """
    return not any(site.schedule.measured for site in plan.sites)


def capacity(schedule: Schedule, length: Count, new: Count, max_length: int | None = None) -> Count:
    """Entries that are allocated after a prompt of `length` tokens and `new` decoded ones.

    A site that evicts has room for its limit from the prompt on. One that is measured has room for
    `interval` entries more than it kept, which is at most all of them.
    """
    seen = length + new
    tokens = seen if schedule.measured else length
    limit = schedule.limit(tokens)
    found = schedule.capacity(seen if limit is None else limit, tokens)
    return found if max_length is None else at_most(found, schedule.most(max_length))


def largest_context(plan: Plan, memory: int | str, batch: int = 1, new: int = 0) -> int | None:
    """The most tokens that the prompts of `batch` rows may have: one more does not fit. None where
    the cache stops growing before it fills `memory`.

    Where layers of different widths share a budget, bytes may fall again with more tokens; what is
    found then is one of the lengths after which one more does not fit.
    """
    size = parse_size(memory)
    check_fit(plan, size, batch, 1, new)
    length = _largest(lambda length: memory_bytes(plan, batch, length, new) <= size)
    return None if length == MOST else length


def largest_batch(plan: Plan, memory: int | str, context: int, new: int = 0) -> int:
    """The most rows with a prompt of `context` tokens each."""
    size = parse_size(memory)
    check_fit(plan, size, 1, context, new)
    return _largest(lambda batch: memory_bytes(plan, batch, context, new) <= size)


def fitting_budget(
    plan_for: Callable[[float], Plan],
    memory: int | str,
    batch: int,
    context: int,
    new: int = 0,
    max_length: int | None = None,
) -> float:
    """The largest fraction for which the plan that `plan_for` makes fits; one larger by 2 ** -53
    does not.

    A fraction that `plan_for` refuses with a PolicyError counts as too small.
    """
    size = parse_size(memory)
    # whatever is refused here is wrong at any budget
    _check_counts(batch, context, new)
    plan_for(1.0)

    def fits(step: int) -> bool:
        try:
            return memory_bytes(plan_for(step / MOST), batch, context, new, max_length) <= size
        except PolicyError:
            return True

    step = _largest(fits)
    if step == 0:
        check_fit(plan_for(1 / MOST), size, batch, context, new, max_length)
    try:
        plan_for(step / MOST)
    except PolicyError as error:
        raise CapacityExceeded(
            f"no budget fits into {size_text(size)}: what does is refused ({error})"
        ) from error
    return step / MOST


def check_fit(
    plan: Plan, memory: int, batch: int, context: int, new: int, max_length: int | None = None
) -> None:
    """Raise a CapacityExceeded that names what is needed, if that is more than `memory`."""
    _check_counts(batch, context, new)
    needed = memory_bytes(plan, batch, context, new, max_length)
    if needed <= memory:
        return
    rows = f"{batch:,} row{'s' * (batch > 1)} of {context:,} token{'s' * (context > 1)}"
    after = f" and {new:,} new ones" if new else ""
    raise CapacityExceeded(
        f"{plan.policy!r} needs {needed:,} bytes ({size_text(needed)}) for {rows}{after}, there "
        f"are {memory:,} ({size_text(memory)}): give more memory, or choose a policy that keeps "
        "less"
    )


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number up to `MOST` that fits, or 0: what is larger than one that does not fit
    does not either.
    """
    low, high = 0, 1
    while fits(high):
        if high == MOST:
            return MOST
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _check_counts(batch: int, context: int, new: int) -> None:
    for name, count, least in (("batch", batch, 1), ("context", context, 1), ("new", new, 0)):
        check_at_least("memory", name, count, least)


def _kinds(plan: Plan) -> Counter[tuple[sympy.Expr, Schedule]]:
    """How many sites there are of each formula and schedule."""
    return Counter((site_formula(site), site.schedule) for site in plan.sites)
