"""The pass that lets a model compute some rows of a prompt over live rows that hold the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import fx
from torch.fx.node import Argument

from kvfx.emit import HINT, add_input, new_size
from kvfx.errors import PolicyError, UnsupportedShape
from kvfx.geometry import Site
from kvfx.graph import Graph, Level, call, fake_mode, operand, replace
from kvfx.ops import overload
from kvfx.pass_manager import Pass, Statistics
from kvfx.passes.narrow_rows import Narrowing, refuse_counted_rows
from kvfx.provenance import Stamp

aten = torch.ops.aten

# what rows are ranked by: squared deviation of values or of keys (CacheBlend, arXiv 2405.16444), or
# the deviation of values times the attention that they receive (KVShare, arXiv 2503.16525)
KINDS = ("values", "keys", "attention")


@dataclass(frozen=True)
class Check:
    """Where rows are ranked and most of them dropped: the index of a site, and one of `KINDS`."""

    site: int
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PolicyError(f"Check(kind={self.kind!r}): choose one of {', '.join(KINDS)}")


@dataclass(frozen=True)
class InsertReuse(Pass):
    """Rewrite each attention to write its rows over the live rows and to see those up to its own
    position: the program `partial`, or with a `check`, `precheck`.

    Before:    o = kvfx.attention(q, k, v, None, position_ids)
    partial:   kvfx.scatter_rows(k, v, position_ids, k_rows, v_rows)
               o = kvfx.attend_rows(q, position_ids, k_rows, v_rows)
    precheck:  the same up to the site of the check; there,
               deviation = kvfx.row_deviation(v, v_rows, position_ids, norm="l1")
               kvfx.scatter_rows(...);  rows = kvfx.choose_rows(score, must, may, slots)
               o = kvfx.attend_rows(kvfx.take_rows(q, rows), kvfx.take_positions(...), ...)
               and the model goes on with these rows alone

    Inputs after the model's: `must`, `may` [B, S] bool and `slots` [n] (precheck), then
    `site_<index>_k_rows`, `site_<index>_v_rows` [B, K, N, D] per site. Outputs after the logits:
    deviation [B, K, S] fp32 and rows [B, n] (precheck); what the newest row attends to at the site
    `watch`, [B, K, N] fp32 (unless it is None). `logits_index` counts the rows that are left.

    Raises UnsupportedShape where a mask is not proven, where rows are counted by their index, for a
    site that the model does not have, and for values without an axis of rows behind the check.
    """

    check: Check | None
    watch: int | None
    name: ClassVar[str] = "insert-reuse"
    consumes: ClassVar[Level] = Level.RAISED
    produces: ClassVar[Level] = Level.CACHED

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Add the inputs, rewrite every site, and add the outputs."""
        graph.program = "partial" if self.check is None else "precheck"
        self._refuse(graph)
        positions, shown = graph.input("position_ids"), _hide_padding(graph)
        choice = _choice_inputs(graph) if self.check is not None else ()
        attentions = graph.calls(overload("attention"))
        watched, measured = [], []
        for rows in _live_rows(graph, attentions):
            q, k, v = (operand(rows.attention, index) for index in range(3))
            check = self.check if self.check and self.check.site == rows.site.index else None
            with graph.module.graph.inserting_before(rows.attention):
                if check is None:
                    rows.scatter(k, v, positions)
                else:
                    measured = rows.scatter_and_choose(check.kind, q, k, v, positions, choice)
                    q = rows.op("take_rows", q, measured[1], axis=2)
                    positions = rows.op("take_positions", positions, measured[1])
                out = rows.attend(q, positions)
                if self.watch == rows.site.index:
                    watched.append(rows.newest(q, positions))
            replace(rows.attention, out)
            if check is not None:
                Narrowing(graph, shown, measured[1], positions, rows.mark).behind(out)
            stats.hit(graph.program)
        output = next(node for node in reversed(graph.nodes) if node.op == "output")
        output.args = ((*cast(tuple[Argument, ...], output.args[0]), *measured, *watched),)

    def _refuse(self, graph: Graph) -> None:
        """Raise an UnsupportedShape for a model whose rows cannot be computed on their own."""
        for index in (self.check.site if self.check else None, self.watch):
            if index is not None and not 0 <= index < len(graph.sites):
                raise UnsupportedShape(f"site {index}: the model has {len(graph.sites)} sites")
        for name, miss in graph.missed.items():
            raise UnsupportedShape(f"{name}: {miss.reason}; rows need a mask that is proven")
        refuse_counted_rows(graph)


@dataclass(frozen=True)
class _LiveRows:
    """Adds the ops of one site on its live rows, at the insertion point of the graph."""

    graph: Graph
    site: Site
    attention: fx.Node
    k_rows: fx.Node
    v_rows: fx.Node

    @property
    def mark(self) -> Stamp:
        return Stamp(self.site.name, self.graph.program, InsertReuse.name)

    def op(self, name: str, *args: Argument, **attributes: Argument) -> fx.Node:
        return call(self.graph, overload(name), args, self.mark, **attributes)

    def scatter(self, k: fx.Node, v: fx.Node, positions: fx.Node) -> None:
        self.op("scatter_rows", k, v, positions, self.k_rows, self.v_rows)

    @property
    def sees(self) -> dict[str, Argument]:
        return {name: x for name, x in self.attention.kwargs.items() if name != "kv_repeat"}

    def attend(self, q: fx.Node, positions: fx.Node) -> fx.Node:
        return self.op("attend_rows", q, positions, self.k_rows, self.v_rows, **self.sees)

    def received(self, q: fx.Node, positions: fx.Node) -> fx.Node:
        return self.op("column_attention", q, self.k_rows, positions, **self.sees)

    def newest(self, q: fx.Node, positions: fx.Node) -> fx.Node:
        """What the row at the largest position attends to, [B, K, N]."""
        row = call(self.graph, aten.argmax.default, (positions, 1, True), self.mark)
        newest = self.op("take_positions", positions, row)
        return self.received(self.op("take_rows", q, row, axis=2), newest)

    def scatter_and_choose(
        self, kind: str, q: fx.Node, k: fx.Node, v: fx.Node, positions: fx.Node,
        choice: tuple[fx.Node, ...],
    ) -> list[fx.Node]:  # fmt: skip
        """Write the rows, and choose some by how far they are from what was there: their deviation
        [B, K, S] (L1 of values), and the indices [B, n] of the chosen ones.
        """
        deviation = self.op("row_deviation", v, self.v_rows, positions, norm="l1")
        new, old = (k, self.k_rows) if kind == "keys" else (v, self.v_rows)
        squares = self.op("row_deviation", new, old, positions, norm="l2")
        self.scatter(k, v, positions)
        score = call(self.graph, aten.sum.dim_IntList, (squares, [1]), self.mark)
        if kind == "attention":
            score = self.op("weigh_rows", deviation, self.received(q, positions), positions)
        return [deviation, self.op("choose_rows", score, *choice)]


def _hide_padding(graph: Graph) -> fx.Node:
    """Position 0 where kvfx sees -1, [B, S], for all that the model computes from positions."""
    position_ids = graph.input("position_ids")
    first = next(node for node in graph.nodes if node.op == "call_function")
    with graph.module.graph.inserting_before(first):
        mark = Stamp("", "hide-padding", InsertReuse.name)
        shown = call(graph, aten.clamp_min.default, (position_ids, 0), mark)
    position_ids.replace_all_uses_with(shown, delete_user_cb=lambda user: user is not shown)
    return shown


def _choice_inputs(graph: Graph) -> tuple[fx.Node, ...]:
    """The inputs `must`, `may` [B, S] bool, and `slots` [n], whose length alone matters."""
    positions = graph.input("position_ids").meta["val"]
    mode = fake_mode(positions)
    assert mode is not None
    with mode:
        which = [torch.empty_like(positions, dtype=torch.bool) for _ in range(2)]
        slots = positions.new_empty(new_size(mode, "slots", HINT))
    values = {"must": which[0], "may": which[1], "slots": slots}
    return tuple(add_input(graph, name, value) for name, value in values.items())


def _live_rows(graph: Graph, attentions: list[fx.Node]) -> list[_LiveRows]:
    """The inputs that hold the live rows of every site: one per position, whatever the window."""
    positions = graph.input("position_ids").meta["val"]
    mode = fake_mode(positions)
    assert mode is not None
    batch, count, live = positions.shape[0], new_size(mode, "rows", HINT), []
    for site, attention in zip(graph.sites, attentions, strict=True):
        with mode:
            k, v = (
                torch.empty(
                    batch, site.kv_heads, count, width, dtype=site.dtype, device=site.device
                )
                for width in (site.head_dim, site.value_dim)
            )
        names = (f"site_{site.index}_{name}" for name in ("k_rows", "v_rows"))
        inputs = (add_input(graph, name, x) for name, x in zip(names, (k, v), strict=True))
        live.append(_LiveRows(graph, site, attention, *inputs))
    return live
