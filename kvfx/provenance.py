"""Where a node comes from: the stamp that every pass puts on what it creates."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

KEY = "kvfx"


@dataclass(frozen=True)
class Stamp:
    """The site a node belongs to (its module path, "" for none), the rule that made it, and the
    pass that ran the rule.
    """

    site: str
    rule: str
    by: str

    def __str__(self) -> str:
        return f"{self.site or 'model'} <- {self.rule}"


def stamp(node: Node, mark: Stamp) -> None:
    """Record where `node` comes from; `meta["custom"]` survives re-export, decomposition and
    save.
    """
    node.meta["custom"] = {**node.meta.get("custom", {}), KEY: (mark.site, mark.rule, mark.by)}


def origin(node: Node) -> Stamp | None:
    """The stamp of `node`, or None for a node of the captured model."""
    mark = node.meta.get("custom", {}).get(KEY)
    return None if mark is None else Stamp(*mark)


def module_path(node: Node) -> str:
    """The path of the innermost module of the captured model that computed `node`, "" when
    unknown.
    """
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""
