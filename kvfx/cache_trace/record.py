"""Runs a compressed model and writes down which token each entry of its caches is.

Entries have no names. But every op that adds, moves or removes them takes a mask over rows
(`store`, `append`, `compact`), and every op that merges them gives the row that each row goes to.
So the programs run node by node, and a list of positions beside each cache goes through the same
moves: exactly, in every format, without looking at keys. One method has no such targets: `CaM`
shares values of dropped rows out among many; those rows are written down as dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from kvfx.cache_trace.trace import CacheTrace, Change, SiteTrace
from kvfx.drawing.buffers import buffer_of, operands_of
from kvfx.errors import InputError
from kvfx.graph import Graph
from kvfx.ops import name_of
from kvfx.planner import Plan
from kvfx.policies.window_ring import WindowRing
from kvfx.provenance import origin
from kvfx.report import short_policy
from kvfx.runtime import Executor, State

ADDS = re.compile(r"(store|append)_(?!entries)")
MOVES = re.compile(r"compact_(?!entries)")
TARGETS = ("merge_sets", "merge_next", "merge_nearest")


@torch.no_grad()
def trace_cache(
    plan: Plan,
    graphs: Mapping[str, Graph],
    prompt_ids: Tensor,
    max_new_tokens: int,
    *,
    max_length: int | None,
    chunk: int | None,
) -> CacheTrace:
    """Read prompt_ids [1, S], decode greedily, and record every cache after every program."""
    if prompt_ids.dim() != 2 or prompt_ids.shape[0] != 1 or prompt_ids.shape[1] == 0:
        raise InputError(f"prompt_ids is {list(prompt_ids.shape)}: a trace follows one row, [1, S]")
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens={max_new_tokens!r}: must be at least 0")
    state = State(plan, 1, max_length)
    ledger = _Ledger(plan, state)
    programs = {name: _Recorder(graph.module, name, ledger) for name, graph in graphs.items()}
    executor = Executor(programs, chunk=chunk)
    device = state.next_position.device
    ids, rows = prompt_ids.to(device), prompt_ids.shape[1]
    positions, last = torch.arange(rows, device=device)[None], torch.tensor([rows - 1])
    logits = executor.prompt(state, ids, positions, last.to(device), [rows])
    for _ in range(max_new_tokens):
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
        logits = executor.decode(state, ids[:, -1:])
    return CacheTrace(
        policy=short_policy(plan.policy),
        tokens=tuple(ids[0].tolist()),
        prompt=rows,
        steps=tuple(ledger.steps),
        seen=tuple(ledger.seen),
        sites=ledger.sites(),
    )


class _Ledger:
    """The positions of all entries, by site and KV head, and what has been written down of them."""

    def __init__(self, plan: Plan, state: State) -> None:
        self.plan = plan
        self.state = state
        self.index = {site.site.name: index for index, site in enumerate(plan.sites)}
        heads = [range(site.site.kv_heads) for site in plan.sites]
        self.entries: list[list[list[int]]] = [[[] for _ in of] for of in heads]
        self.taken_out: dict[int, list[list[int]]] = {}
        self.merged: list[list[dict[int, int]]] = [[{} for _ in of] for of in heads]
        self.last: list[list[dict[int, str]]] = [[{} for _ in of] for of in heads]
        self.changes: list[list[list[Change]]] = [[[] for _ in of] for of in heads]
        self.steps: list[str] = []
        self.seen: list[int] = []

    def add(self, site: int, keep: Tensor, new: Sequence[int]) -> None:
        """Kept rows [1, K, T] become entries: those at positions `new`, or entries taken out."""
        rows = self.taken_out.pop(site, None)
        for head, kept in enumerate(keep[0].tolist()):
            of = new if rows is None else rows[head]
            self.entries[site][head] += [of[row] for row, stays in enumerate(kept) if stays]

    def move(self, site: int, keep: Tensor) -> None:
        """Only kept entries [1, K, C] stay."""
        for head, kept in enumerate(keep[0].tolist()):
            held = self.entries[site][head]
            self.entries[site][head] = [p for row, p in enumerate(held) if kept[row]]

    def take_out(self, site: int) -> None:
        """All entries are about to be stored anew."""
        self.taken_out[site] = self.entries[site]
        self.entries[site] = [[] for _ in self.entries[site]]

    def merge(self, site: int, target: Tensor, new: Sequence[int]) -> None:
        """Rows go into the rows that `target` [1, K, T] names: new ones, or entries."""
        for head, into in enumerate(target[0].tolist()):
            rows = self.entries[site][head] or new
            for row, position in enumerate(rows):
                if position >= 0 and into[row] not in (row, -1):
                    self.merged[site][head][position] = rows[into[row]]

    def write_down(self, program: str) -> None:
        """Record what the program has changed."""
        step, seen = len(self.steps), self.state.positions[0]
        self.steps.append(program)
        self.seen.append(seen)
        for site, heads in enumerate(self.entries):
            for head in range(len(heads)):
                statuses = self._status(site, head, seen)
                before = self.last[site][head]
                merged = self.merged[site][head]
                self.changes[site][head] += [
                    Change(
                        step, position, status, merged.get(position) if status == "merged" else None
                    )
                    for position, status in statuses.items()
                    if before.get(position) != status
                ]
                self.last[site][head] = statuses

    def sites(self) -> tuple[SiteTrace, ...]:
        """What was written down."""
        return tuple(
            SiteTrace(site.site.name, tuple(map(tuple, changes)))
            for site, changes in zip(self.plan.sites, self.changes, strict=True)
        )

    def _status(self, site: int, head: int, seen: int) -> dict[int, str]:
        """The status of each position that was seen."""
        buffers, store = self.state.buffers[site], self.plan.sites[site].store
        if isinstance(store, WindowRing):
            held = {p: "exact" for p in buffers["position"][0].tolist() if p >= 0}
            return {position: held.get(position, "passed") for position in range(seen)}
        coded = 0
        if "k_quantized" in buffers:
            coded = max(int(buffers[name][0, head]) for name in ("k_quantized", "v_quantized"))
        held = {
            position: "quantized" if row < coded else "exact"
            for row, position in enumerate(self.entries[site][head])
        }
        merged = self.merged[site][head]
        gone = {p: "merged" if p in merged else "dropped" for p in range(seen) if p not in held}
        return {position: (held | gone)[position] for position in range(seen)}


class _Recorder(fx.Interpreter):
    """Runs a program on one row, and tells the ledger what becomes of entries."""

    def __init__(self, module: fx.GraphModule, program: str, ledger: _Ledger) -> None:
        super().__init__(module)
        self.program = program
        self.ledger = ledger
        self.new: list[int] = []

    def __call__(self, *args: Tensor) -> tuple[Tensor, ...]:
        result = self.run(*args)
        self.ledger.write_down(self.program)
        return result

    def run_node(self, n: fx.Node) -> object:
        """The value of a node; what it does to entries is noted."""
        name, mark = name_of(n.target), origin(n)
        if name is not None and mark is not None and mark.site in self.ledger.index:
            self._note(name, n, self.ledger.index[mark.site])
        elif str(n.target) == "aten.zero_.default":
            self._note_reset(n)
        result = super().run_node(n)
        if n.op == "placeholder" and n.target == "position_ids":
            self.new = result[0].tolist()
        if name in TARGETS and mark is not None:
            self.ledger.merge(self.ledger.index[mark.site], result, self.new)
        return result

    def _note(self, name: str, node: fx.Node, site: int) -> None:
        keep = next((value for name, value, _ in operands_of(node) if name == "keep"), None)
        if not isinstance(keep, fx.Node):
            return
        if ADDS.match(name):
            self.ledger.add(site, self.env[keep], self.new)
        elif MOVES.match(name):
            self.ledger.move(site, self.env[keep])

    def _note_reset(self, node: fx.Node) -> None:
        buffer = buffer_of(node.all_input_nodes[0])
        if buffer is not None and buffer[1] == "length":
            self.ledger.take_out(buffer[0])
