"""The cache as explicit operands: symbolic buffers, their allocation, and their bytes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import sympy
import torch

BATCH = sympy.Symbol("batch", positive=True, integer=True)
CAPACITY = sympy.Symbol("capacity", positive=True, integer=True)

BUCKET = 256

Extent = int | sympy.Expr
# a number, or the same number as an expression: arithmetic on capacities is written once for both
Count = TypeVar("Count", int, sympy.Expr)


def in_buckets(entries: Count) -> Count:
    """The smallest whole number of buckets that holds `entries`: caches grow by buckets, not by
    tokens.
    """
    return in_steps(at_least(entries, 1), BUCKET)


def in_steps(entries: Count, step: int) -> Count:
    """The smallest multiple of `step` that holds `entries`."""
    if isinstance(entries, int):
        return -(-entries // step) * step
    return sympy.ceiling(entries / step) * step


def at_least(entries: Count, least: Count | int) -> Count:
    """The larger of the two."""
    if isinstance(entries, int) and isinstance(least, int):
        return max(entries, least)
    return sympy.Max(entries, least)  # pyright: ignore[reportReturnType]


def at_most(entries: Count, most: Count | int) -> Count:
    """The smaller of the two."""
    if isinstance(entries, int) and isinstance(most, int):
        return min(entries, most)
    return sympy.Min(entries, most)  # pyright: ignore[reportReturnType]


def budgeted(budget: float | int, tokens: Count) -> Count:
    """Entries that a budget allows: a count, or a fraction of `tokens`, rounded up from the product
    of doubles.
    """
    if isinstance(tokens, int):
        return budget if isinstance(budget, int) else math.ceil(budget * tokens)
    if isinstance(budget, int):
        return sympy.Integer(budget)
    return sympy.ceiling(sympy.Float(budget) * tokens)


def deferred(name: str, count: Callable[[int], int], tokens: Count) -> Count:
    """`count(tokens)`; of a symbol, a function of that name which is the number as soon as its
    argument is one.
    """
    if isinstance(tokens, int):
        return count(tokens)

    def known(_: type, argument: sympy.Expr) -> sympy.Integer | None:
        whole = isinstance(argument, sympy.Integer)
        return sympy.Integer(count(int(argument))) if whole else None

    facts = {"eval": classmethod(known), "is_integer": True, "is_nonnegative": True}
    return type(name, (sympy.Function,), facts)(tokens)  # pyright: ignore[reportReturnType]


@functools.cache
def evaluated(extent: Extent, batch: int, capacity: int) -> int:
    """An expression in `BATCH` and `CAPACITY` as a number."""
    value = sympy.sympify(extent).subs([(BATCH, batch), (CAPACITY, capacity)])
    assert isinstance(value, sympy.Integer), (
        f"{extent} is not a whole number at {batch}, {capacity}"
    )
    return value.p


@dataclass(frozen=True)
class Buffer:
    """One stored tensor of a site: its shape in `BATCH` and `CAPACITY`, and its dtype.

    `fill` is its value in an empty cache. A `counter` is zeroed when the entries of the site are
    rewritten.
    """

    shape: tuple[Extent, ...]
    dtype: torch.dtype
    fill: float = 0
    counter: bool = False

    def sizes(self, batch: int, capacity: int) -> tuple[int, ...]:
        """The shape for a batch and a capacity, as integers."""
        return tuple(evaluated(extent, batch, capacity) for extent in self.shape)

    def bytes(self) -> sympy.Expr:
        """Bytes of the buffer as an expression in `BATCH` and `CAPACITY`."""
        return sympy.Mul(*map(sympy.sympify, self.shape)) * self.dtype.itemsize

    @property
    def fixed_axes(self) -> tuple[int, ...]:
        """The axes whose size never changes."""
        return tuple(axis for axis, extent in enumerate(self.shape) if isinstance(extent, int))

    def allocate(self, batch: int, capacity: int, device: torch.device) -> torch.Tensor:
        """An empty buffer on `device`."""
        return torch.full(self.sizes(batch, capacity), self.fill, dtype=self.dtype, device=device)

    def resize(self, old: torch.Tensor, batch: int, capacity: int) -> torch.Tensor:
        """The same entries in a buffer of another capacity (entries beyond a smaller one are
        dropped).
        """
        sizes = self.sizes(batch, capacity)
        if tuple(old.shape) == sizes:
            return old
        new = old.new_full(sizes, self.fill)
        common = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, sizes, strict=True))
        new[common] = old[common]
        return new
