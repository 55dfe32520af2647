"""Runs the programs of reuse on live rows: some tokens of a prompt at any positions, over the keys
and values of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kvfx.errors import InputError
from kvfx.geometry import Site
from kvfx.graph import Graph
from kvfx.kernels.common.rotation import rotate
from kvfx.pass_manager import run_passes
from kvfx.passes.insert_reuse import Check
from kvfx.passes.pipeline import Target, reuse_passes

Numbers = Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class LiveRows:
    """The rows of one request while it is prefilled: per site keys [1, K, N, D], rotated to their
    positions, and values [1, K, N, Dv]. The index of a row is its position, at every site.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        """Positions that there is room for."""
        return self.keys[0].shape[2]


@dataclass(frozen=True, eq=False)
class Step:
    """What `partial` found: the logits [V] of the row at the largest position, and what that row
    attends to at the watched site, [K, N] fp32 summed over the query heads of a KV head.
    """

    logits: Tensor
    attention: Tensor | None


@dataclass(frozen=True, eq=False)
class Checked:
    """What `precheck` found, beside what a `Step` has: the positions of the rows that were computed
    to the end, ascending, and the deviation [K, S] fp32 of all given rows at the checked site, the
    L1 norm of their values minus those that were there.
    """

    logits: Tensor
    attention: Tensor | None
    positions: tuple[int, ...]
    deviation: Tensor


class Runner:
    """Runs a model's raised graph as the programs `partial` and `precheck`, eagerly; each is built
    when it is first needed. The graph is copied, its weights are shared.

    Raises UnsupportedShape, at the first run, for a model whose rows cannot be computed on their
    own (`kvfx.passes.insert_reuse`).
    """

    def __init__(self, raised: Graph) -> None:
        self.sites = raised.sites
        self._raised = raised
        self._programs: dict[tuple[Check | None, int | None], fx.GraphModule] = {}

    def rows(self, count: int) -> LiveRows:
        """Live rows for `count` positions, all zeros."""
        return LiveRows(
            tuple(_zeros(site, count, site.head_dim) for site in self.sites),
            tuple(_zeros(site, count, site.value_dim) for site in self.sites),
        )

    def dense(self, rows: LiveRows, tokens: Numbers) -> Step:
        """Compute all tokens from position 0 on: the model's own prefill, whatever `rows` held."""
        return self.partial(rows, tokens, range(len(tokens)), watch=None)

    def partial(
        self, rows: LiveRows, tokens: Numbers, positions: Numbers, *, watch: int | None
    ) -> Step:
        """Compute tokens [S] at positions [S], any of them and in any order; their keys and values
        replace those in `rows`. Position -1 marks padding.

        A row sees the rows up to its own position as they are in `rows` by then. `watch` is the
        index of the site whose attention is reported. Raises InputError for positions that are not
        in `rows` or not distinct.
        """
        ids, where = self._inputs(rows, tokens, positions)
        logits, attention = self.read(rows, ids, where, where[0].argmax()[None], watch=watch)
        return Step(logits[0, 0], attention)

    def read(
        self, rows: LiveRows, ids: Tensor, positions: Tensor, index: Tensor, *, watch: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """The same of checked inputs: ids and positions [1, S], logits [1, L, V] of the rows index
        [L].
        """
        logits, *watched = self._run(None, watch, rows, ids, positions, index)
        return logits, watched[0][0] if watched else None

    def precheck(
        self, rows: LiveRows, tokens: Numbers, positions: Numbers, must: Sequence[bool] | Tensor,
        may: Sequence[bool] | Tensor, *, keep: int, check: Check, watch: int | None,
    ) -> Checked:  # fmt: skip
        """Compute tokens [S] at ascending positions [S] up to the checked site, rank them there by
        how far they are from what `rows` held, and compute `keep` of them to the end.

        Those are all in `must` [S], and of those in `may` [S] the best; fewer, if there are not so
        many. All rows replace those in `rows` at the sites up to the checked one, the chosen ones
        at those behind it too. Raises InputError where `must` lacks the last row, whose logits are
        wanted, or has more than `keep` rows, and for positions that do not ascend.
        """
        ids, where = self._inputs(rows, tokens, positions)
        device = where.device
        forced, free = (torch.as_tensor(x, dtype=torch.bool, device=device) for x in (must, may))
        given = where[0].tolist()
        if given != sorted(given):
            raise InputError(f"precheck: positions must ascend, they are {given}")
        if not forced.shape == free.shape == where.shape[1:] or not bool(forced[-1]):
            raise InputError(f"precheck: must and may are one bool per row ({len(given)} of them)"
                             ", and the last row, whose logits are wanted, is in must")  # fmt: skip
        if int(forced.sum()) > keep:
            raise InputError(f"precheck: keep={keep} is less than the {int(forced.sum())} in must")
        count = min(keep, int((forced | free).sum()))
        index, slots = torch.tensor([count - 1], device=device), torch.empty(count, device=device)
        choice = (forced[None], free[None], slots)
        found = self._run(check, watch, rows, ids, where, index, *choice)
        logits, deviation, chosen, *watched = found
        kept = tuple(given[row] for row in chosen[0].tolist())
        return Checked(logits[0, 0], watched[0][0] if watched else None, kept, deviation[0])

    def canonical(
        self, rows: LiveRows, start: int, stop: int
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Copies of the rows at positions `start` to `stop`: per site keys [K, T, D] turned back to
        position 0, in fp32, and values [K, T, Dv] as they are. A constant factor of the rotary
        embedding (YaRN's) stays in the keys.
        """
        if not 0 <= start < stop <= rows.length:
            raise InputError(f"canonical({start}, {stop}) of {rows.length} live rows")
        keys = (
            _turned(site, k[0, :, start:stop], -start, -1)
            for site, k in zip(self.sites, rows.keys, strict=True)
        )
        return tuple(keys), tuple(v[0, :, start:stop].clone() for v in rows.values)

    def write(
        self, rows: LiveRows, position: int, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        """Write canonical keys [K, T, D] and values [K, T, Dv] per site into `rows` from `position`
        on, keys rotated to their positions, in fp32. Raises InputError where they do not fit.
        """
        count = keys[0].shape[1]
        if not 0 <= position <= rows.length - count:
            raise InputError(f"{count} rows at position {position} of {rows.length} live rows")
        here = slice(position, position + count)
        for index, site in enumerate(self.sites):
            k, v = (x[index].to(site.device) for x in (keys, values))
            rows.keys[index][0, :, here] = _turned(site, k, position, 1).to(site.dtype)
            rows.values[index][0, :, here] = v.to(site.dtype)

    def _inputs(self, rows: LiveRows, tokens: Numbers, positions: Numbers) -> tuple[Tensor, Tensor]:
        device = self.sites[0].device
        if not isinstance(positions, Tensor):
            positions = list(positions)
        ids, where = (
            torch.as_tensor(x, dtype=torch.int64, device=device) for x in (tokens, positions)
        )
        real = where[where >= 0]
        if ids.dim() != 1 or ids.shape != where.shape or not len(real):
            raise InputError(
                f"tokens {list(ids.shape)} and positions {list(where.shape)} must be two lists of "
                "one length, with a position that is not -1"
            )
        if int(real.max()) >= rows.length or int(where.min()) < -1:
            raise InputError(
                f"positions {int(where.min())} to {int(real.max())}: there are {rows.length} live "
                "rows"
            )
        if len(real.unique()) != len(real):
            raise InputError("two rows have one position: which of them counts is not defined")
        return ids[None], where[None]

    def _run(
        self, check: Check | None, watch: int | None, rows: LiveRows, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Run one program, which is built if it is not there yet."""
        key = (check, watch)
        if key not in self._programs:
            # its ops have one backend, on every device
            target = Target("reference", inductor_cpu=False)
            graph = run_passes(self._raised.copy(), reuse_passes(check, watch, target), None)
            self._programs[key] = graph.module
        live = (x for pair in zip(rows.keys, rows.values, strict=True) for x in pair)
        with torch.no_grad():
            return self._programs[key](*inputs, *live)


def _zeros(site: Site, count: int, width: int) -> Tensor:
    # rows that nobody wrote must not be NaN: a weight of zero does not hide that
    return torch.zeros(1, site.kv_heads, count, width, dtype=site.dtype, device=site.device)


def _turned(site: Site, keys: Tensor, first: int, step: int) -> Tensor:
    """A copy of keys [K, T, D] rotated by `first`, `first + step`, ... positions."""
    if site.rope is None:
        return keys.clone()
    shift = first + step * torch.arange(keys.shape[1], device=keys.device)
    frequencies = torch.tensor(site.rope.frequencies, dtype=torch.float32, device=keys.device)
    return rotate(keys[None], shift[None, None], frequencies, site.rope.style)[0]
