"""The pass that introduces the KV cache: each attention becomes its plan's ops on explicit buffers,
per program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.fx.node import Argument

from kvfx.cache import BATCH, CAPACITY
from kvfx.graph import Graph, Level, call, fake_mode, replace
from kvfx.ops import overload
from kvfx.pass_manager import Pass, Statistics
from kvfx.plan import Plan, SitePlan
from kvfx.provenance import Stamp, origin

aten = torch.ops.aten


@dataclass(frozen=True)
class InsertCache(Pass):
    """Rewrite each attention into the ops of one program, on the buffers of its site.

    Before:   o = kvfx.attention(q, k, v, None, position_ids)
    prefill:  o = kvfx.attend_prompt(q, k, v, position_ids);  score, select;  kvfx.store(k, v, keep,
    *buffers)
    extend:   o = kvfx.extend(q, k, v, position_ids, *buffers);  kvfx.store(k, v, live, *buffers)
    decode:   kvfx.append(k, v, live, *buffers);  o = kvfx.attend(q, position_ids, *buffers)
    compact:  (the model is gone)  kvfx.flush(*buffers)   or   load, score, select, zero the
    counters, store
    """

    plan: Plan
    program: str
    name: ClassVar[str] = "insert-cache"
    consumes: ClassVar[Level] = Level.RAISED
    produces: ClassVar[Level] = Level.CACHED

    def run(self, graph: Graph, stats: Statistics) -> None:
        """Add the buffers as inputs and rewrite every site."""
        graph.program = self.program
        attentions = {
            origin(node).site: node for node in graph.calls(torch.ops.kvfx.attention.default)
        }
        if self.program == "compact":
            _drop_model(graph)
        else:
            _hide_padding(graph)
        tokens = (
            _tokens_input(graph)
            if self.plan.selects and self.program in ("prefill", "compact")
            else None
        )
        for site in self.plan.sites:
            emit = _Emitter(graph, site, _buffer_inputs(graph, site), tokens, self.name)
            if self.program == "compact":
                with graph.module.graph.inserting_before(_output(graph)):
                    _compact(emit)
            else:
                attention = attentions[site.site.name]
                with graph.module.graph.inserting_before(attention):
                    out = PROGRAMS[self.program](emit, *attention.args[:3])
                replace(attention, out)
            stats.hit(f"{self.program} {site.store.room}")
        if self.program == "compact":
            for name in ("input_ids", "position_ids", "logits_index"):
                graph.module.graph.erase_node(graph.input(name))


@dataclass(frozen=True)
class _Emitter:
    """Adds stamped nodes for one site at the insertion point."""

    graph: Graph
    plan: SitePlan
    buffers: tuple[fx.Node, ...]
    tokens: fx.Node | None
    by: str

    @property
    def position_ids(self) -> fx.Node:
        return self.graph.input("position_ids")

    @property
    def length(self) -> fx.Node:
        names = list(self.plan.store.buffers(self.plan.site))
        return self.buffers[names.index("length")]

    def op(self, name: str, *args: Argument, **attributes: Argument) -> fx.Node:
        """One kvfx op by name, stamped with the site and the rule of its plan."""
        return call(self.graph, overload(name), args, self.mark, **attributes)

    def room(self, verb: str, *rows: Argument, **attributes: Argument) -> fx.Node:
        """One op of the store's room: rows, then the buffers, then the store's attributes."""
        store = self.plan.store
        return self.op(
            f"{verb}_{store.room}",
            *rows,
            *self.buffers,
            **attributes,
            **store.attributes(self.plan.site),
        )

    def rows(self, keep: fx.Node) -> fx.Node:
        """What tells the store which rows to write."""
        return keep if self.plan.store.rows == "keep" else self.position_ids

    def live(self) -> fx.Node:
        """The rows that are not padding."""
        return self.op("live_rows", self.position_ids, kv_heads=self.plan.site.kv_heads)

    @property
    def mark(self) -> Stamp:
        return Stamp(self.plan.site.name, self.plan.methods, self.by)


def _prefill(emit: _Emitter, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    site = emit.plan.site
    out = emit.op("attend_prompt", q, k, v, emit.position_ids, scale=site.scale, window=site.window)
    keep = _select(emit, q, k, v, emit.live())
    emit.room("store", _at_entries(emit, k, keep, emit.position_ids, None), v, emit.rows(keep))
    return out


def _extend(emit: _Emitter, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    live = emit.live()
    q, k = (_at_entries(emit, x, live, emit.position_ids, emit.length) for x in (q, k))
    out = emit.room("extend", q, k, v, emit.position_ids, scale=emit.plan.site.scale)
    emit.room("store", k, v, emit.rows(live))
    return out


def _decode(emit: _Emitter, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    live = emit.live()
    q, k = (_at_entries(emit, x, live, emit.position_ids, emit.length) for x in (q, k))
    emit.room("append", k, v, emit.rows(live))
    return emit.room("attend", q, emit.position_ids, scale=emit.plan.site.scale)


def _compact(emit: _Emitter) -> None:
    if emit.plan.select is None:
        if emit.plan.store.flushes:
            emit.room("flush")
        return
    loaded = emit.room("load")
    k, v, live = (call(emit.graph, _getitem, (loaded, index), emit.mark) for index in range(3))
    keep = _select(emit, None, k, v, live)
    k = _at_entries(emit, k, keep, None, None)
    for node, buffer in zip(
        emit.buffers, emit.plan.store.buffers(emit.plan.site).values(), strict=True
    ):
        if buffer.counter:
            call(emit.graph, aten.zero_.default, (node,), emit.mark)
    emit.room("store", k, v, keep)


PROGRAMS: dict[str, Callable[[_Emitter, fx.Node, fx.Node, fx.Node], fx.Node]] = {
    "prefill": _prefill,
    "extend": _extend,
    "decode": _decode,
}


def _select(emit: _Emitter, q: fx.Node | None, k: fx.Node, v: fx.Node, live: fx.Node) -> fx.Node:
    """The rows that keep an entry: all live ones, or those that the plan's select policy chooses."""
    select, site = emit.plan.select, emit.plan.site
    if select is None:
        return live
    fraction, entries = (
        (1.0, select.budget) if isinstance(select.budget, int) else (select.budget, 0)
    )
    count = emit.op(
        "allocate_uniform",
        emit.tokens,
        kv_heads=site.kv_heads,
        fraction=fraction,
        entries=entries,
        least=select.least(),
    )
    if select.score is None:
        return emit.op(select.select, live, count, **select.attributes())
    score = emit.op(select.score, q, k, v, live)
    return emit.op(select.select, score, live, count, **select.attributes())


def _at_entries(
    emit: _Emitter, x: fx.Node, keep: fx.Node, position_ids: fx.Node | None, length: fx.Node | None
) -> fx.Node:
    """Queries or keys rotated from their position to the index of their entry, if the select policy
    wants that.
    """
    select, rope = emit.plan.select, emit.plan.site.rope
    if select is None or select.positions == "absolute":
        return x
    assert rope is not None
    name = f"frequencies_{emit.plan.site.index}"
    if not hasattr(emit.graph.module, name):
        device = x.meta["val"].device
        emit.graph.module.register_buffer(
            name, torch.tensor(rope.frequencies, dtype=torch.float32, device=device)
        )
    frequencies = emit.graph.module.graph.get_attr(name)
    mode = fake_mode(x.meta["val"])
    assert mode is not None
    frequencies.meta["val"] = mode.from_tensor(getattr(emit.graph.module, name), static_shapes=True)
    shift = emit.op("entry_shift", keep, position_ids, length)
    return emit.op("rotate", x, shift, frequencies, style=rope.style)


def _getitem(values: tuple[object, ...], index: int) -> object:
    return values[index]


def _hide_padding(graph: Graph) -> None:
    """The model sees position 0 where kvfx sees -1: embeddings and rotations have no entry for
    padding.
    """
    position_ids = graph.input("position_ids")
    users = [
        user
        for user in position_ids.users
        if origin(user) is None and user.target is not aten.sym_size.int
    ]
    if not users:
        return
    with graph.module.graph.inserting_before(
        next(node for node in graph.nodes if node.op == "call_function")
    ):
        clamped = call(
            graph,
            aten.clamp_min.default,
            (position_ids, 0),
            Stamp("", "hide-padding", InsertCache.name),
        )
    for user in users:
        user.replace_input_with(position_ids, clamped)


def _drop_model(graph: Graph) -> None:
    """Keep the inputs' symbols but none of the model: compact works on buffers alone."""
    output = _output(graph)
    output.args = ((),)
    for node in reversed(graph.nodes):
        if node.op not in ("output", "placeholder"):
            graph.module.graph.erase_node(node)


def _output(graph: Graph) -> fx.Node:
    return next(node for node in reversed(graph.module.graph.nodes) if node.op == "output")


def _tokens_input(graph: Graph) -> fx.Node:
    """The input `prompt_tokens` [B]: tokens of the prompt that budgets refer to."""
    position_ids = graph.input("position_ids")
    return _placeholder(graph, "prompt_tokens", position_ids.meta["val"][:, 0])


def _buffer_inputs(graph: Graph, plan: SitePlan) -> tuple[fx.Node, ...]:
    """One input per buffer of the site, with symbolic batch and capacity."""
    batch = graph.input("position_ids").meta["val"].shape[0]
    mode = fake_mode(graph.input("position_ids").meta["val"])
    assert mode is not None and mode.shape_env is not None
    prefix = f"site_{plan.site.index}"
    capacity = _symbol(mode, f"{prefix}_capacity", 512)
    nodes = []
    for name, buffer in plan.store.buffers(plan.site).items():
        sizes = enumerate(buffer.sizes(batch.node.hint, 512))
        shape = [
            {BATCH: batch, CAPACITY: capacity}.get(extent, size)
            if isinstance(extent, int) or extent in (BATCH, CAPACITY)
            else _symbol(mode, f"{prefix}_{name}_{axis}", size)
            for (axis, size), extent in zip(sizes, buffer.shape, strict=True)
        ]
        with mode:
            value = torch.empty(shape, dtype=buffer.dtype, device=plan.site.device)
        nodes.append(_placeholder(graph, f"{prefix}_{name}", value))
    return tuple(nodes)


def _symbol(mode: torch._subclasses.FakeTensorMode, name: str, hint: int) -> torch.SymInt:
    """A fresh size that is only known at run time."""
    assert mode.shape_env is not None
    source = ConstantSource(name)
    symbol = mode.shape_env.create_symbol(hint, source, DimDynamic.DYNAMIC)
    return mode.shape_env.create_symintnode(symbol, hint=hint, source=source)


def _placeholder(graph: Graph, name: str, value: object) -> fx.Node:
    """A new input after the existing ones."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.module.graph.inserting_after(last):
        node = graph.module.graph.placeholder(name)
    node.meta["val"] = value
    return node
