"""The cache of a site as a layer sees it: who reads which state of it, and who writes the next."""

from __future__ import annotations

import re

from torch import fx

from kvfx.ops import name_of
from kvfx.provenance import origin

BUFFER = re.compile(r"site_(\d+)_(\w+)")
# ops that leave what was there as it is
ADDS = re.compile(r"(store|append)_|extend_entries")
# counts of entries: every op reads them
COUNTS = ("length", "start")


def buffer_of(node: fx.Node) -> tuple[int, str] | None:
    """The number of the site and the name of the buffer that a graph input is, or None."""
    found = BUFFER.fullmatch(str(node.target)) if node.op == "placeholder" else None
    return None if found is None else (int(found.group(1)), found.group(2))


def operands_of(node: fx.Node) -> list[tuple[str, object, bool]]:
    """The operands of a kvfx op: name, value, and whether it is written."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False))
    given.update(node.kwargs)
    return [
        (
            argument.name,
            given.get(argument.name, argument.default_value),
            argument.alias_info is not None and argument.alias_info.is_write,
        )
        for argument in schema.arguments
    ]


class Versions:
    """The states that the cache of a layer goes through, in the order of its nodes.

    `held[v]` names the buffers that are read or written of state v. `read[node]` is the state that
    a node reads, `written[node]` the one that it helps to write. `title` names the store.
    """

    def __init__(self, nodes: list[fx.Node]) -> None:
        self.held: list[tuple[str, ...]] = []
        self.read: dict[fx.Node, int] = {}
        self.written: dict[fx.Node, int] = {}
        self.title = "cache"
        # writes that follow each other make one state
        self._growing = False
        for node in nodes:
            if name_of(node.target) is not None:
                self._op(node)
            elif not str(node.target).split(".")[0].endswith("_"):
                self._reads(node, [node for node in node.all_input_nodes if buffer_of(node)])

    def _op(self, node: fx.Node) -> None:
        reads, writes = [], []
        for name, value, written in operands_of(node):
            if not isinstance(value, fx.Node) or buffer_of(value) is None:
                continue
            if written:
                writes.append(value)
            if name not in COUNTS and not (written and ADDS.match(name_of(node.target) or "")):
                reads.append(value)
        self._reads(node, reads)
        if writes:
            mark = origin(node)
            if mark is not None:
                self.title = f"{mark.rule.rpartition(' | ')[2]} cache"
            if not self._growing:
                self.held.append(())
            self._growing = True
            self._hold(writes)
            self.written[node] = len(self.held) - 1

    def _reads(self, node: fx.Node, buffers: list[fx.Node]) -> None:
        if not buffers:
            return
        if not self.held:
            self.held.append(())
        self._growing = False
        self._hold(buffers)
        self.read[node] = len(self.held) - 1

    def _hold(self, buffers: list[fx.Node]) -> None:
        names = [found[1] for node in buffers if (found := buffer_of(node)) is not None]
        self.held[-1] = tuple(dict.fromkeys((*self.held[-1], *names)))
