"""How a pass adds the ops and the buffers of one site to a program."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx
from torch.fx.node import Argument

from kvfx.cache import BATCH, CAPACITY, Buffer
from kvfx.constants import add_constant
from kvfx.graph import Graph, call, fake_mode
from kvfx.ops import overload
from kvfx.planner import SitePlan
from kvfx.policy import Attributes
from kvfx.provenance import Stamp

HINT = 512


@dataclass(frozen=True)
class Emitter:
    """Adds stamped nodes for one site at the insertion point of its graph.

    `inputs` are the site's buffers by name, those of its store first; `tokens` is the input with
    the prompt lengths that budgets refer to, where the program has one; `attention` is the raised
    op of the site, where the program computes it. Other sites read what a `shared` one stores.
    """

    graph: Graph
    plan: SitePlan
    inputs: dict[str, fx.Node]
    tokens: fx.Node | None
    by: str
    attention: fx.Node | None = None
    shared: bool = False

    @property
    def mark(self) -> Stamp:
        """The stamp of everything that is added: the site and the methods of its plan."""
        return Stamp(self.plan.site.name, self.plan.methods, self.by)

    @property
    def position_ids(self) -> fx.Node:
        """The positions of the program's rows [B, S]."""
        return self.graph.input("position_ids")

    @property
    def buffers(self) -> tuple[fx.Node, ...]:
        """The buffers of the store, in the order in which its ops take them."""
        return tuple(self.inputs[name] for name in self.plan.store.buffers(self.plan.site))

    @property
    def length(self) -> fx.Node:
        """The buffer that counts live entries."""
        return self.inputs["length"]

    def call(self, target: Callable[..., object], *args: Argument) -> fx.Node:
        """One node that is not a kvfx op."""
        return call(self.graph, target, args, self.mark)

    def op(self, name: str, *args: Argument, **attributes: Argument) -> fx.Node:
        """One kvfx op by name."""
        return call(self.graph, overload(name), args, self.mark, **attributes)

    def named(
        self, name: str, operands: Mapping[str, fx.Node | None], attributes: Attributes
    ) -> fx.Node:
        """One kvfx op, which takes those operands that its schema names."""
        known: dict[str, Argument] = {**operands, **self.rules()}
        arguments = overload(name)._schema.arguments
        taken = [argument for argument in arguments if not argument.kwarg_only]
        while taken[-1].has_default_value() and known.get(taken[-1].name) is None:
            taken.pop()
        if "softcap" in known and any(argument.name == "softcap" for argument in arguments):
            attributes = {**attributes, "softcap": cast(float, known["softcap"])}
        return self.op(name, *(known.get(argument.name) for argument in taken), **attributes)

    def rules(self) -> dict[str, Argument]:
        """What attention does at this site besides scaled products inside a window, as arguments of
        its ops.
        """
        if self.attention is None:
            return {}
        others = ("scale", "kv_repeat", "window")
        return {name: x for name, x in self.attention.kwargs.items() if name not in others}

    def item(self, values: fx.Node, index: int) -> fx.Node:
        """One output of an op that has several."""
        return self.call(operator.getitem, values, index)

    @property
    def suffix(self) -> str:
        """What ends the names of ops on entries whose heads share their memory."""
        return f"_{self.plan.store.room}" if self.plan.store.ragged else ""

    @property
    def counts(self) -> tuple[fx.Node, ...]:
        """The buffers that tell which entries are live."""
        return (self.inputs["start"], self.length) if self.plan.store.ragged else (self.length,)

    def write(self, verb: str, name: str, x: fx.Node, keep: fx.Node) -> None:
        """Store, extend or append numbers x [B, K, S] beside entries, ahead of the entries."""
        self.op(f"{verb}_entries{self.suffix}", x, keep, *self.counts, self.inputs[name])

    def room(self, verb: str, *rows: Argument, **attributes: Argument) -> fx.Node:
        """One op of the store's room: rows, then the buffers, then the store's attributes."""
        store = self.plan.store
        attributes = {**attributes, **store.attributes(self.plan.site)}
        return self.op(f"{verb}_{store.room}", *rows, *self.buffers, **attributes)

    def rows(self, keep: fx.Node) -> fx.Node:
        """What tells the store which rows to write."""
        return keep if self.plan.store.rows == "keep" else self.position_ids

    def live(self) -> fx.Node:
        """The rows that are not padding."""
        return self.op("live_rows", self.position_ids, kv_heads=self.plan.site.kv_heads)

    def frequencies(self) -> fx.Node:
        """The rotary frequencies of the site as a constant of the graph."""
        site = self.plan.site
        assert site.rope is not None
        values = torch.tensor(site.rope.frequencies, dtype=torch.float32, device=site.device)
        return add_constant(self.graph, f"frequencies_{site.index}", values)


def add_tokens_input(graph: Graph) -> fx.Node:
    """The input `prompt_tokens` [B]: tokens of the prompt that budgets refer to."""
    return add_input(graph, "prompt_tokens", graph.input("position_ids").meta["val"][:, 0])


def add_history_inputs(graph: Graph) -> tuple[fx.Node, fx.Node]:
    """The inputs `history_ids` and `history_positions` [B, T]: all tokens seen, new ones too."""
    positions = graph.input("position_ids").meta["val"]
    mode = fake_mode(positions)
    assert mode is not None
    length = new_size(mode, "history", HINT)
    with mode:
        values = [positions.new_empty(positions.shape[0], length) for _ in range(2)]
    ids = add_input(graph, "history_ids", values[0])
    return ids, add_input(graph, "history_positions", values[1])


def add_buffer_inputs(
    graph: Graph, plan: SitePlan, known: dict[tuple[Buffer, ...], tuple[torch.Tensor, ...]]
) -> dict[str, fx.Node]:
    """One input per buffer of the site, by name, with symbolic batch and capacity.

    Sites with equal buffers have values of equal shape: `known` remembers them within a program.
    """
    buffers = plan.buffers
    layout = tuple(buffers.values())
    if layout not in known:
        known[layout] = _buffer_values(graph, plan, buffers)
    prefix = f"site_{plan.site.index}"
    values = zip(buffers, known[layout], strict=True)
    return {name: add_input(graph, f"{prefix}_{name}", value) for name, value in values}


def _buffer_values(
    graph: Graph, plan: SitePlan, buffers: dict[str, Buffer]
) -> tuple[torch.Tensor, ...]:
    positions = graph.input("position_ids").meta["val"]
    mode = fake_mode(positions)
    assert mode is not None
    prefix = f"site_{plan.site.index}"
    sizes: dict[object, torch.SymInt] = {
        BATCH: positions.shape[0],
        CAPACITY: new_size(mode, f"{prefix}_capacity", HINT),
    }
    values = []
    for name, buffer in buffers.items():
        shape = _symbolic_shape(buffer, sizes, mode, f"{prefix}_{name}")
        with mode:
            values.append(torch.empty(shape, dtype=buffer.dtype, device=plan.site.device))
    return tuple(values)


def _symbolic_shape(
    buffer: Buffer,
    sizes: dict[object, torch.SymInt],
    mode: torch._subclasses.FakeTensorMode,
    name: str,
) -> list[int | torch.SymInt]:
    """The shape of a buffer, where an expression in the capacity becomes a size of its own."""
    hints = buffer.sizes(int(sizes[BATCH].node.hint), HINT)
    return [
        sizes[extent]
        if extent in sizes
        else hint
        if isinstance(extent, int)
        else new_size(mode, f"{name}_{axis}", hint)
        for axis, (extent, hint) in enumerate(zip(buffer.shape, hints, strict=True))
    ]


def new_size(mode: torch._subclasses.FakeTensorMode, name: str, hint: int) -> torch.SymInt:
    """A fresh size that is only known at run time."""
    # these modules load the whole of Dynamo, which takes seconds: not at import
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    environment = mode.shape_env
    assert environment is not None
    source = ConstantSource(name)
    symbol = environment.create_symbol(hint, source, DimDynamic.DYNAMIC)
    return cast(torch.SymInt, environment.create_symintnode(symbol, hint=hint, source=source))


def add_input(graph: Graph, name: str, value: object) -> fx.Node:
    """A new input after the existing ones."""
    last = graph.module.graph.find_nodes(op="placeholder")[-1]
    with graph.module.graph.inserting_after(last):
        node = graph.module.graph.placeholder(name)
    node.meta["val"] = value
    return node
